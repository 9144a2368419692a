//! `docs/reference/cli.md`: what each program says of itself with `--help`.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::NOTICE;

const PROGRAMS: [&str; 2] = ["turret-operator", "turret-worker"];

/// The page. `help` runs a program with words and returns what it prints.
pub fn page(help: &dyn Fn(&str, &[&str]) -> Result<String>) -> Result<String> {
    let mut page = format!(
        "<!-- {NOTICE} -->\n\n# Command line reference\n\n\
         What each program prints with `--help`. Environment variables stand beside the options they set.\n"
    );
    for program in PROGRAMS {
        let text = help(program, &["--help"])?;
        write!(page, "\n## {program}\n\n```text\n{}\n```\n", tidy(&text))?;
        let commands = commands(&text);
        ensure!(!commands.is_empty(), "`{program} --help` lists no commands:\n{text}");
        for command in commands {
            let text = help(program, &[command, "--help"])?;
            write!(page, "\n### {program} {command}\n\n```text\n{}\n```\n", tidy(&text))?;
        }
    }
    Ok(page)
}

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<&str> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        // Continued descriptions are indented deeper.
        .filter(|line| !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect()
}

fn tidy(text: &str) -> String {
    text.trim_end().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "What it is\n\nUsage: x <COMMAND>\n\nCommands:\n  run   Run it\n          longer\n  crds  Print\n  help  Print this message\n\nOptions:\n  -h, --help  Print help\n";

    #[test]
    fn commands_are_read_from_the_help() {
        assert_eq!(commands(HELP), ["run", "crds"]);
    }

    #[test]
    fn a_program_without_commands_is_refused() {
        assert!(page(&|_, _| Ok("nothing".into())).is_err());
        let text = page(&|program, words| {
            Ok(if words.len() == 1 { HELP.into() } else { format!("{program} {words:?}") })
        });
        assert!(text.unwrap().contains("### turret-worker crds"));
    }
}
