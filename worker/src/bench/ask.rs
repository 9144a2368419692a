//! Taking turns: one take for every line that is read.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::time::Instant;

use serde_json::{Value, json};

use super::engine::Loaded;
use super::probe::Probe;
use super::takes::Take;
use super::{BenchArgs, BenchError};
use crate::telemetry::chain;
use turret_kernels::simd::InstructionSet;
use turret_threads::{Pool, allowed_threads};

/// The take of which everybody needs the answer: memory as large as a step's weights, read once.
const READ: &str = "read";

/// Says what can be taken, then takes what is asked for until nothing more is.
pub(super) async fn answer(
    args: &BenchArgs,
    questions: impl BufRead,
    mut answers: impl Write,
) -> Result<(), BenchError> {
    let loaded = Loaded::load(args).await?;
    let probe = Probe::new(loaded.step_bytes)?;
    let pool = Pool::new(allowed_threads());
    let takes = Take::all(args);
    let mut names: Vec<String> = takes.iter().map(|take| take.name()).collect();
    names.push(READ.into());
    let mut say = |answer: &Value| -> std::io::Result<()> {
        writeln!(answers, "{answer}")?;
        answers.flush()
    };
    say(&json!({
        "info": format!("{:?}, {} threads", InstructionSet::get(), allowed_threads()),
        "takes": names,
        "stepBytes": loaded.step_bytes,
        "lensBytes": loaded.lens_bytes,
    }))?;
    for question in questions.lines() {
        let question = question?;
        let asked = takes.iter().find(|take| take.name() == question.trim());
        let found = match asked {
            Some(take) => loaded.take(*take).await.map(|found| {
                found.into_iter().map(|found| (found.name, found.seconds)).collect::<BTreeMap<_, _>>()
            }),
            None if question.trim() == READ => {
                let start = Instant::now();
                std::hint::black_box(probe.pass(&pool));
                Ok(BTreeMap::from([(READ.into(), start.elapsed().as_secs_f64())]))
            }
            None => {
                say(&json!({"error": format!("`{question}` is none of: {}", names.join("; "))}))?;
                continue;
            }
        };
        match found {
            Ok(seconds) => say(&json!({"seconds": seconds}))?,
            Err(error) => say(&json!({"error": chain(&error)}))?,
        }
    }
    loaded.shutdown().await;
    Ok(())
}
