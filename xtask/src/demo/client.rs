//! Asks the gateway the way any client does: OpenAI's chat API over HTTP.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The gateway, reached at one address.
#[derive(Clone)]
pub struct Gateway {
    agent: ureq::Agent,
    url: String,
    namespace: String,
}

/// An answer and what it took.
pub struct Answer {
    /// What the model said.
    pub text: String,
    /// From sending the request to the whole answer.
    pub took: Duration,
    /// Of it, bringing the lens into memory.
    pub lens_load: Option<Duration>,
    /// Of it, waiting for the base switch.
    pub base_switch: Option<Duration>,
    /// The worker that answered.
    pub worker: String,
}

impl Gateway {
    /// The gateway at `url`, asked for models of `namespace`.
    pub fn new(url: impl Into<String>, namespace: impl Into<String>) -> Gateway {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(300)))
            .http_status_as_error(false)
            .build();
        Gateway { agent: config.into(), url: url.into(), namespace: namespace.into() }
    }

    /// Asks one question, greedily.
    pub fn ask(&self, model: &str, question: &str, max_tokens: u32) -> Result<Answer> {
        let messages = json!([{"role": "user", "content": question}]);
        let began = Instant::now();
        let mut response = self
            .agent
            .post(format!("{}/v1/chat/completions", self.url))
            .header("x-turret-namespace", &self.namespace)
            .send_json(
                json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}),
            )
            .with_context(|| format!("failed to ask `{model}` at {}", self.url))?;
        let status = response.status();
        let header =
            |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let millis = |name: &str| {
            header(name).and_then(|v| v.parse::<f64>().ok()).map(|ms| Duration::from_secs_f64(ms / 1e3))
        };
        let (lens_load, base_switch) = (millis("x-turret-load-ms"), millis("x-turret-switch-ms"));
        let worker = header("x-turret-worker").unwrap_or_default();
        let body: Value =
            response.body_mut().read_json().with_context(|| format!("`{model}` answered no JSON"))?;
        let took = began.elapsed();
        if status != 200 {
            bail!(
                "`{model}` answered {status}: {}",
                body["error"]["message"].as_str().unwrap_or("no message")
            );
        }
        let text = body["choices"][0]["message"]["content"]
            .as_str()
            .with_context(|| format!("`{model}` answered without content: {body}"))?
            .to_owned();
        Ok(Answer { text, took, lens_load, base_switch, worker })
    }
}
