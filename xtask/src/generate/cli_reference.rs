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
        section(&mut page, help, program, &[])?;
    }
    Ok(page)
}

/// A program, or a command of it, and then its own commands.
fn section(
    page: &mut String,
    help: &dyn Fn(&str, &[&str]) -> Result<String>,
    program: &str,
    path: &[&str],
) -> Result<()> {
    let text = help(program, &[path, &["--help"]].concat())?;
    let level = "#".repeat(path.len() + 2);
    let title = format!("{program} {}", path.join(" "));
    write!(page, "\n{level} {}\n\n```text\n{}\n```\n", title.trim_end(), tidy(&text))?;
    let commands = commands(&text);
    ensure!(!path.is_empty() || !commands.is_empty(), "`{program} --help` lists no commands:\n{text}");
    for command in commands {
        section(page, help, program, &[path, &[command]].concat())?;
    }
    Ok(())
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
            Ok(match words {
                ["--help"] | ["crds", "--help"] => HELP.into(),
                _ => format!("{program} {words:?}"),
            })
        });
        let text = text.unwrap();
        for title in ["## turret-worker", "### turret-worker crds", "#### turret-worker crds run"] {
            assert!(text.contains(&format!("\n{title}\n")), "{title} is missing in {text}");
        }
    }
}
