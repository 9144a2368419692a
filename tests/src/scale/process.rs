//! What the kernel says of a process: CPU and memory.

use anyhow::{Context, Result};

/// In so many parts a second the kernel tells processes' times, on every architecture.
const TICKS: f64 = 100.0;

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU of all its threads, also those that ended: seconds, to a hundredth.
    pub cpu_seconds: f64,
    /// Resident memory now, bytes.
    pub resident_bytes: u64,
    /// The most it ever was, bytes.
    pub peak_bytes: u64,
}

/// What a process has used so far.
pub fn usage(pid: u32) -> Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))
    };
    of(&read("stat")?, &read("status")?).with_context(|| format!("/proc/{pid} has no times or no memory"))
}

fn of(stat: &str, status: &str) -> Option<Usage> {
    // The second field is the program's name in parentheses, which may hold anything; the third follows the last of them.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    };
    Some(Usage {
        cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS,
        resident_bytes: bytes("VmRSS")?,
        peak_bytes: bytes("VmHWM")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194304 100 0 0 0 150 50 7 8 20 0 4 0 99 1000 200";
        let status = "Name:\ta\nVmPeak:\t 900 kB\nVmHWM:\t     300 kB\nVmRSS:\t     200 kB\n";
        let found = of(stat, status).unwrap();
        assert_eq!(found, Usage { cpu_seconds: 2.0, resident_bytes: 200 * 1024, peak_bytes: 300 * 1024 });
        assert_eq!(of(stat, "Name:\tkthreadd\n"), None);
    }

    #[test]
    fn a_process_that_runs_has_used_something() {
        let own = usage(std::process::id()).unwrap();
        assert!(own.resident_bytes > 0 && own.peak_bytes >= own.resident_bytes, "{own:?}");
    }
}
