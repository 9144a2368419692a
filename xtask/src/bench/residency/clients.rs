//! Clients over HTTP, each with one connection that stays open, which ask again as soon as they have their answer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the worker's answer says of a load that the request waited for, milliseconds.
const LOAD_HEADER: &str = "x-turret-load-ms";

/// A client of one worker.
pub(super) struct Client {
    agent: ureq::Agent,
    url: String,
}

/// What one answer took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Answer {
    /// From sending the request to the whole answer.
    pub(super) seconds: f64,
    /// Of it, loading the lens, if the request waited for that.
    pub(super) load_seconds: Option<f64>,
}

/// What all clients together were answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Loop {
    /// From the first request to the last answer.
    pub(super) seconds: f64,
    /// In no order.
    pub(super) answers: Vec<Answer>,
}

impl Client {
    /// Of the worker whose data port has this address.
    pub(super) fn of(data: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        Self { agent: config.into(), url: format!("{data}/v1/completions") }
    }

    /// Asks for one token.
    pub(super) fn ask(&self, model: &str) -> Result<Answer> {
        let failed = || format!("failed to ask `{model}`");
        let body = json!({"model": model, "prompt": "Hi", "max_tokens": 1, "temperature": 0}).to_string();
        let began = Instant::now();
        let sent = self.agent.post(self.url.as_str()).content_type("application/json").send(body);
        let mut response = sent.with_context(failed)?;
        let answer = response.body_mut().read_to_vec().with_context(failed)?;
        let seconds = began.elapsed().as_secs_f64();
        if response.status() != 200 {
            bail!("`{model}` answered {}: {}", response.status(), String::from_utf8_lossy(&answer));
        }
        let load = response.headers().get(LOAD_HEADER).and_then(|value| value.to_str().ok());
        let load_seconds = load.and_then(|text| text.parse::<f64>().ok()).map(|millis| millis / 1e3);
        Ok(Answer { seconds, load_seconds })
    }
}

impl Loop {
    /// Seconds between two answers, on average.
    pub(super) fn seconds_per_request(&self) -> f64 {
        self.seconds / self.answers.len() as f64
    }

    /// Answers for which no lens was loaded.
    pub(super) fn hits(&self) -> usize {
        self.answers.iter().filter(|answer| answer.load_seconds.is_none()).count()
    }
}

/// Has all clients ask for these models in turn, while `goes_on` says so of a request's number.
pub(super) fn closed_loop(
    clients: &[Client],
    models: &[String],
    goes_on: &(dyn Fn(usize) -> bool + Sync),
) -> Result<Loop> {
    let asked = AtomicUsize::new(0);
    let next = || {
        let number = asked.fetch_add(1, Ordering::Relaxed);
        goes_on(number).then(|| models[number % models.len()].as_str())
    };
    let ask_all = |client: &Client| {
        let mut answers = Vec::new();
        while let Some(model) = next() {
            answers.push(client.ask(model)?);
        }
        anyhow::Ok(answers)
    };
    let ask_all = &ask_all;
    let began = Instant::now();
    let answers = std::thread::scope(|scope| {
        let asking: Vec<_> = clients.iter().map(|client| scope.spawn(move || ask_all(client))).collect();
        let answered = asking.into_iter().map(|thread| thread.join().expect("a client does not panic"));
        answered.collect::<Result<Vec<_>>>()
    })?;
    Ok(Loop { seconds: began.elapsed().as_secs_f64(), answers: answers.concat() })
}

/// Asks for every model once, one after the other.
pub(super) fn touch(client: &Client, models: &[String]) -> Result<()> {
    models.iter().try_for_each(|model| client.ask(model).map(drop))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    use super::*;

    /// Answers every request on a connection; `None` when there is none any more.
    fn answer(connection: &TcpStream, reader: &mut impl BufRead) -> Option<()> {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body = String::from_utf8(body).ok()?;
        let (status, header) = match (body.contains("\"gone\""), body.contains("\"evicted\"")) {
            (true, _) => ("404 Not Found", ""),
            (_, true) => ("200 OK", "x-turret-load-ms: 12.5\r\n"),
            _ => ("200 OK", ""),
        };
        let text = format!("HTTP/1.1 {status}\r\n{header}content-length: 5\r\n\r\nhello");
        let mut connection = connection;
        connection.write_all(text.as_bytes()).ok()
    }

    /// Address of a server that counts connections.
    fn serve(connections: Arc<AtomicUsize>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                connections.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(connection.try_clone().unwrap());
                    while answer(&connection, &mut reader).is_some() {}
                });
            }
        });
        address
    }

    #[test]
    fn every_client_keeps_its_connection_and_models_are_asked_for_in_turn() {
        let connections = Arc::new(AtomicUsize::new(0));
        let address = serve(connections.clone());
        let clients = [Client::of(&address), Client::of(&address)];
        let models = ["resident".to_owned(), "evicted".to_owned()];
        let found = closed_loop(&clients, &models, &|number| number < 20).unwrap();
        assert_eq!((found.answers.len(), found.hits()), (20, 10));
        assert!(found.answers.iter().all(|answer| answer.load_seconds.is_none_or(|load| load == 0.0125)));
        assert!(found.answers.iter().all(|answer| answer.seconds <= found.seconds));
        assert!((1..=2).contains(&connections.load(Ordering::SeqCst)), "connections stay open");
    }

    #[test]
    fn a_refusal_ends_the_loop_with_what_was_said() {
        let address = serve(Arc::default());
        let gone = ["gone".to_owned()];
        let refused = closed_loop(&[Client::of(&address)], &gone, &|_| true).unwrap_err().to_string();
        assert_eq!(refused, "`gone` answered 404 Not Found: hello");
    }
}
