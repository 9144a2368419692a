//! `cargo xtask image`.

use anyhow::Result;
use clap::Args;

use super::{Program, build};

/// Which images to write.
#[derive(Args)]
pub struct ImageArguments {
    /// The programs; all when none is named
    programs: Vec<Program>,
    /// Answer as JSON
    #[arg(long)]
    json: bool,
}

/// Writes the images and prints where they are.
pub fn run(arguments: &ImageArguments) -> Result<()> {
    let all = Program::ALL;
    let programs = if arguments.programs.is_empty() { &all } else { arguments.programs.as_slice() };
    let images = build(programs)?;
    if arguments.json {
        println!("{:#}", serde_json::to_value(&images)?);
        return Ok(());
    }
    for image in images {
        println!("{} {} {}", image.reference(), image.digest, image.path.display());
    }
    Ok(())
}
