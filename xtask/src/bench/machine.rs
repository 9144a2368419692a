//! The machine, as far as it explains the numbers.

use std::fs::read_to_string;

use serde::Serialize;

/// Instruction sets that engines choose by.
const FLAGS: [&str; 8] =
    ["avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"];

/// What the system says of itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Machine {
    pub(super) processor: String,
    pub(super) flags: Vec<String>,
    /// Those that this process may use.
    pub(super) processors: usize,
    pub(super) memory_bytes: u64,
    /// Whether memory comes in 2 MiB pages: `always`, `madvise` or `never`.
    pub(super) huge_pages: String,
}

impl Machine {
    pub(super) fn look() -> Self {
        let read = |path: &str| read_to_string(path).unwrap_or_default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::of(
            &read("/proc/cpuinfo"),
            &read("/proc/meminfo"),
            &read("/sys/kernel/mm/transparent_hugepage/enabled"),
            processors,
        )
    }

    fn of(cpuinfo: &str, meminfo: &str, huge_pages: &str, processors: usize) -> Self {
        let value = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let has = value(cpuinfo, "flags").unwrap_or_default();
        let flags = FLAGS.iter().filter(|flag| has.split(' ').any(|one| one == **flag));
        let kib = value(meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        let chosen = huge_pages.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        Self {
            processor: value(cpuinfo, "model name").unwrap_or_else(|| "unknown".into()),
            flags: flags.map(|flag| (*flag).to_owned()).collect(),
            processors,
            memory_bytes: kib.unwrap_or(0) * 1024,
            huge_pages: chosen.map_or("unknown", |(chosen, _)| chosen).into(),
        }
    }

    /// All of it on one line.
    pub(super) fn describe(&self) -> String {
        format!(
            "{}, {} processors ({}), {:.0} GiB of memory, huge pages: {}",
            self.processor,
            self.processors,
            self.flags.join(" "),
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.huge_pages
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_prints_is_read() {
        let machine = Machine::of(
            "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 fma avx512\n",
            "MemTotal:       24000000 kB\nMemFree: 1 kB\n",
            "always [madvise] never\n",
            2,
        );
        assert_eq!((machine.processor.as_str(), machine.processors), ("AMD EPYC", 2));
        assert_eq!(machine.flags, ["avx2", "fma"]);
        assert_eq!((machine.memory_bytes, machine.huge_pages.as_str()), (24_576_000_000, "madvise"));
        let described = "AMD EPYC, 2 processors (avx2 fma), 23 GiB of memory, huge pages: madvise";
        assert_eq!(machine.describe(), described);
    }
}
