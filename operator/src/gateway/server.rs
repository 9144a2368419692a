//! Takes connections, and ends without breaking a stream.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// How long a client may take to send the head of a request, and an idle connection may stay open.
const HEAD_TIME: Duration = Duration::from_secs(120);
/// How long a connection that was never used is waited for when the gateway stops.
const FIRST_WORD_TIME: Duration = Duration::from_secs(1);
/// Most connections at once.
const MOST_CONNECTIONS: usize = 20_000;

/// Serves until `closing` turns true, then takes no more connections, lets every request that runs
/// end, and returns.
pub async fn serve(listener: TcpListener, router: Router, mut closing: watch::Receiver<bool>) {
    let connections = TaskTracker::new();
    let places = Arc::new(tokio::sync::Semaphore::new(MOST_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = told(&mut closing) => break,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Such as too many open files: the next attempt may come too soon as well.
                tracing::warn!(%error, "a connection could not be taken");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let mut closing = closing.clone();
        connections.spawn(async move {
            let has_asked = Arc::new(AtomicBool::new(false));
            let asked = has_asked.clone();
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                asked.store(true, Ordering::Relaxed);
                let router = router.clone();
                async move {
                    let Ok(response) = router.oneshot(request.map(Body::new)).await;
                    Ok::<_, Infallible>(response)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = told(&mut closing) => {
                    connection.as_mut().graceful_shutdown();
                    match tokio::time::timeout(FIRST_WORD_TIME, connection.as_mut()).await {
                        Ok(ended) => ended,
                        Err(_) if has_asked.load(Ordering::Relaxed) => connection.await,
                        // Opened in advance and never used: hyper would wait for its first request.
                        Err(_) => Ok(()),
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended");
            }
            drop(place);
        });
    }
    // Who connects from now on is refused at once, and does not wait for an answer that never comes.
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves the admin port for ever: nobody's stream runs over it, so it ends with the process.
pub async fn serve_admin(listener: TcpListener, routes: Router) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "admin port listens");
    }
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    if let Err(error) = axum::serve(listener, service).await {
        tracing::error!(%error, "the admin port ended");
    }
}

async fn told(closing: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it the gateway.
    let _ = closing.wait_for(|closing| *closing).await;
}

type Accepted = (tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, places: &Arc<tokio::sync::Semaphore>) -> std::io::Result<Accepted> {
    let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}
