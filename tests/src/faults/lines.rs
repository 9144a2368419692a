//! A watch as it is passed on: cut into lines, and what a fault does to each. Pure, but for who carries the acts out.

use std::time::Duration;

use axum::body::Bytes;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::{Value, json};

use super::plan::{Fault, Roll};

/// Longest delay of an event that comes late.
const LATEST_MILLIS: u64 = 700;
/// What happened while the operator was down is told this late where lists are stale.
const LAG: Duration = Duration::from_millis(400);

/// Cuts a body into lines.
#[derive(Debug, Default)]
pub struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that are whole with this piece of the body, without their ends.
    pub fn push(&mut self, piece: &[u8]) -> Vec<Bytes> {
        self.rest.extend_from_slice(piece);
        let mut lines = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            lines.push(Bytes::from(line).slice(..end));
        }
        lines
    }
}

/// One thing to do on a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Pass a line on.
    Send(Bytes),
    /// Wait first.
    Wait(Duration),
    /// The operator's view is not what it should be any more: before long it must be told to list again.
    Hurt,
    /// Tell it at once.
    Gone,
    /// End the stream as if its time were over.
    End,
    /// Break the connection.
    Break,
}

/// What a fault does to one open watch.
#[derive(Debug)]
pub struct Watched {
    fault: Option<Fault>,
    /// An event that waits for the one behind it.
    held: Option<Bytes>,
    is_first: bool,
}

impl Watched {
    /// A watch that was just opened.
    pub fn new(fault: Option<Fault>) -> Self {
        Self { fault, held: None, is_first: true }
    }

    /// What to do with an event.
    pub fn take(&mut self, line: Bytes, roll: Roll) -> Vec<Act> {
        let is_first = std::mem::replace(&mut self.is_first, false);
        if let Some(held) = self.held.take() {
            return vec![Act::Send(line), Act::Send(held), Act::Hurt];
        }
        match self.fault {
            Some(Fault::ListsAreStale) if is_first => vec![Act::Wait(LAG), Act::Send(line)],
            _ if !roll.strikes() => vec![Act::Send(line)],
            Some(Fault::EventsAreDropped) => vec![Act::Hurt],
            Some(Fault::EventsAreDelayed) => {
                let late = Duration::from_millis(100 + roll.below(LATEST_MILLIS - 100));
                vec![Act::Wait(late), Act::Send(line)]
            }
            Some(Fault::EventsAreDoubled) => vec![Act::Send(line.clone()), Act::Send(line)],
            Some(Fault::EventsAreReordered) => {
                self.held = Some(line);
                Vec::new()
            }
            Some(Fault::WatchesEnd) => {
                vec![Act::Send(line), if roll.coin(1) { Act::End } else { Act::Break }]
            }
            Some(Fault::PlacesAreGone) => vec![Act::Send(line), Act::Gone],
            _ => vec![Act::Send(line)],
        }
    }

    /// Whether an event waits for the one behind it.
    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Nothing came behind it: it is only late.
    pub fn release(&mut self) -> Option<Act> {
        self.held.take().map(Act::Send)
    }
}

/// Whether a line tells of a change of an object.
pub fn is_event(line: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Head {
        #[serde(rename = "type")]
        type_: String,
    }
    let head = serde_json::from_slice::<Head>(line);
    head.is_ok_and(|head| matches!(head.type_.as_str(), "ADDED" | "MODIFIED" | "DELETED"))
}

/// The line by which the API server says that a watch cannot go on from where it is.
pub fn gone() -> Bytes {
    let event = json!({"type": "ERROR", "object": status(410)});
    Bytes::from(event.to_string())
}

/// A refusal as the API server words it.
pub fn status(code: u16) -> Value {
    let (reason, message) = match code {
        409 => ("Conflict", "the object has been modified; please apply your changes to the latest version"),
        410 => ("Expired", "the provided resource version is too old"),
        429 => ("TooManyRequests", "too many requests, please try again later"),
        503 => ("ServiceUnavailable", "the server is currently unable to handle the request"),
        _ => ("InternalError", "an error on the server has prevented the request from succeeding"),
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

/// Moves every time in a value, as if the clock that wrote them were so many seconds ahead.
pub fn shift_times(value: &mut Value, seconds: i64) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|field| shift_times(field, seconds)),
        Value::Array(items) => items.iter_mut().for_each(|item| shift_times(item, seconds)),
        Value::String(text) => {
            let time = text.ends_with('Z').then(|| text.parse::<Timestamp>().ok()).flatten();
            let shifted = time.and_then(|time| time.checked_add(SignedDuration::from_secs(seconds)).ok());
            if let Some(shifted) = shifted {
                *text = shifted.to_string();
            }
        }
        _ => {}
    }
}

/// The same in a text of JSON; what is none stays as it is.
pub fn shift_times_in(text: Bytes, seconds: i64) -> Bytes {
    match serde_json::from_slice::<Value>(&text) {
        Ok(mut value) => {
            shift_times(&mut value, seconds);
            Bytes::from(value.to_string())
        }
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str) -> Bytes {
        Bytes::from(json!({"type": "MODIFIED", "object": {"metadata": {"name": name}}}).to_string())
    }

    /// The first roll that strikes, and the first that does not.
    fn rolls() -> (Roll, Roll) {
        let first = |wanted: bool| (0..).map(|n| Roll::of(5, "x", n)).find(|roll| roll.strikes() == wanted);
        (first(true).unwrap(), first(false).unwrap())
    }

    #[test]
    fn lines_are_whole_wherever_the_body_is_cut() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"{\"a\""), [] as [Bytes; 0]);
        assert_eq!(lines.push(b":1}\n\n{\"b\""), ["{\"a\":1}", ""]);
        assert_eq!(lines.push(b":2}\n{}\n"), ["{\"b\":2}", "{}"]);
    }

    #[test]
    fn what_does_not_strike_passes() {
        let (_, passes) = rolls();
        for fault in Fault::ALL.into_iter().filter(|fault| *fault != Fault::ListsAreStale) {
            assert_eq!(
                Watched::new(Some(fault)).take(line("a"), passes),
                [Act::Send(line("a"))],
                "{fault:?}"
            );
        }
    }

    #[test]
    fn each_fault_does_to_an_event_what_it_is_called() {
        let (strikes, _) = rolls();
        let acts = |fault: Fault| Watched::new(Some(fault)).take(line("a"), strikes);
        assert_eq!(acts(Fault::EventsAreDropped), [Act::Hurt]);
        assert_eq!(acts(Fault::EventsAreDoubled), [Act::Send(line("a")), Act::Send(line("a"))]);
        assert_eq!(acts(Fault::PlacesAreGone), [Act::Send(line("a")), Act::Gone]);
        assert!(matches!(acts(Fault::EventsAreDelayed)[..], [Act::Wait(_), Act::Send(_)]));
        assert!(matches!(acts(Fault::WatchesEnd)[..], [Act::Send(_), Act::End | Act::Break]));
        assert!(matches!(acts(Fault::ListsAreStale)[..], [Act::Wait(_), Act::Send(_)]));
    }

    #[test]
    fn a_reordered_event_comes_behind_the_next_or_alone_when_there_is_none() {
        let (strikes, passes) = rolls();
        let mut watched = Watched::new(Some(Fault::EventsAreReordered));
        assert_eq!(watched.take(line("a"), strikes), []);
        assert!(watched.is_holding());
        let swapped = [Act::Send(line("b")), Act::Send(line("a")), Act::Hurt];
        assert_eq!(watched.take(line("b"), passes), swapped);
        assert_eq!(watched.take(line("c"), strikes), []);
        assert_eq!(watched.release(), Some(Act::Send(line("c"))));
        assert!(!watched.is_holding());
    }

    #[test]
    fn what_the_api_server_says_of_the_watch_itself_is_no_event() {
        let bookmark = br#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7"}}}"#;
        assert!(is_event(&line("a")));
        assert!(!is_event(bookmark) && !is_event(&gone()) && !is_event(b"no json"));
    }

    #[test]
    fn times_are_moved_wherever_they_are_and_nothing_else() {
        let mut value = json!({
            "metadata": {"name": "2026", "managedFields": [{"time": "2026-01-01T23:30:00Z"}]},
            "spec": {"renewTime": "2026-01-01T00:00:00.250000Z", "count": 3},
        });
        shift_times(&mut value, 3600);
        assert_eq!(value["metadata"]["managedFields"][0]["time"], "2026-01-02T00:30:00Z");
        assert_eq!(value["spec"]["renewTime"], "2026-01-01T01:00:00.25Z");
        assert_eq!((&value["metadata"]["name"], &value["spec"]["count"]), (&json!("2026"), &json!(3)));
        assert_eq!(shift_times_in(Bytes::from("no json"), 1), "no json");
    }
}
