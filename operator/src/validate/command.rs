//! The command line: reads, judges, prints, and says by its exit code how it went.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::{files, objects};

/// Options of `turret-operator validate`.
#[derive(Args, Clone, Debug)]
pub struct ValidateArgs {
    /// A file of YAML or JSON, a folder that is searched for *.yaml, *.yml and *.json, or - for standard input. May be
    /// repeated
    #[arg(short, long = "filename", value_name = "FILE|FOLDER|-", required = true)]
    filenames: Vec<PathBuf>,
    /// Namespace of objects that name none
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How the problems are printed, to standard output
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// How problems are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A line for each: FILE:DOCUMENT kind/namespace/name: path: message
    Text,
    /// One JSON object
    Json,
}

/// Validates files. The exit code is 0 when all is fine, 1 when an object is invalid, 2 when a file cannot be read.
pub fn run(args: &ValidateArgs) -> anyhow::Result<ExitCode> {
    let read = files::read(&args.filenames, io::stdin().lock());
    let mut report = objects::judge(&read.documents, &args.namespace);
    report.unreadable = read.unreadable;
    let out = io::stdout().lock();
    match args.output {
        Output::Text => {
            report.write_lines(out)?;
            eprintln!("{}", report.summary());
        }
        Output::Json => report.write_json(out)?,
    }
    Ok(ExitCode::from(report.exit_code()))
}
