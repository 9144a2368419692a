//! What a cluster could leave on this machine, looked at from outside.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cgroups;
use super::node::SETTINGS;
use super::state::State;
use crate::packages::find_program;
use crate::privilege;

/// Everything at one moment, one line for each thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks now.
    pub fn look() -> Result<Traces> {
        let mut found = BTreeSet::new();
        let mut add = |kind: &str, text: &str| {
            let lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
            found.extend(lines.map(|line| format!("{kind}: {line}")));
        };
        add("link", &links(&output("ip", &["-o", "link"])?));
        add("route", &output("ip", &["-4", "route", "show", "table", "all"])?);
        add("packet rule", &rules(&output("iptables-save", &[])?));
        add("mount", &mounts(&fs::read_to_string("/proc/self/mounts")?));
        for folder in [
            "/run/netns",
            "/var/run/netns",
            "/var/lib/cni",
            "/var/lib/kubelet",
            "/var/log/pods",
            "/var/log/containers",
        ] {
            add("folder", if Path::new(folder).exists() { folder } else { "" });
        }
        for (setting, _) in SETTINGS {
            let value = fs::read_to_string(Path::new("/proc/sys").join(setting)).unwrap_or_default();
            add("setting", &format!("{setting} = {value}"));
        }
        Ok(Traces(found))
    }

    /// Fails with a list of what is there now and was not then, or that belongs to the
    /// cluster `name`. Clusters of other names may come and go meanwhile.
    pub fn assert_nothing_more(&self, name: &str) -> Result<()> {
        let others = links_of_others(name);
        let now = Traces::look()?;
        let of_another = |line: &&String| others.iter().any(|link| mentions(line, link));
        let more = now.0.difference(&self.0).filter(|line| !of_another(line));
        let mut left: Vec<String> = more.cloned().collect();
        left.extend(
            cgroups::present(&cgroups::name_of(name))
                .iter()
                .map(|group| format!("cgroup: {}", group.display())),
        );
        left.extend(processes_of(name).iter().map(|pid| format!("process: {pid}")));
        if left.is_empty() {
            return Ok(());
        }
        bail!("the cluster left behind:\n  {}", left.join("\n  "))
    }
}

/// The processes of a cluster: those in its control groups, and those that were told its folder.
pub fn processes_of(name: &str) -> Vec<u32> {
    let group = format!("/{}/", cgroups::name_of(name));
    let folders = State::candidates(name).map(|state| state.folder().display().to_string());
    let is_of_cluster = |pid: &u32| {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        groups.contains(&group) || folders.iter().any(|folder| line.contains(folder.as_str()))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let pids = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    pids.filter(is_of_cluster).collect()
}

/// This machine's links to the clusters that are up and called otherwise.
fn links_of_others(name: &str) -> Vec<String> {
    let names = State::candidates(name).into_iter().filter_map(|state| {
        let siblings = fs::read_dir(state.folder().parent()?).ok()?;
        Some(siblings.filter_map(Result::ok).map(|entry| entry.file_name()).collect::<Vec<_>>())
    });
    let names = names.flatten().filter_map(|other| other.into_string().ok());
    names
        .filter(|other| other != name)
        .filter_map(|other| super::find(&other).ok())
        .map(|cluster| cluster.subnets.host_link())
        .collect()
}

fn mentions(line: &str, link: &str) -> bool {
    line.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == link)
}

/// The names of links; what follows changes by itself.
fn links(text: &str) -> String {
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    names.collect::<Vec<_>>().join("\n")
}

/// The rules without comments and counters, and without tables that are there but empty.
fn rules(text: &str) -> String {
    text.lines().filter(|line| line.starts_with("-A")).collect::<Vec<_>>().join("\n")
}

/// Where something is mounted.
fn mounts(text: &str) -> String {
    let points = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    points.collect::<Vec<_>>().join("\n")
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let found = find_program(program).with_context(|| format!("no program `{program}`"))?;
    let mut words = vec![found.into_os_string()];
    words.extend(arguments.iter().map(Into::into));
    let mut command: Command = privilege::as_root(&words);
    let output = command.output().with_context(|| format!("failed to start `{program}`"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_mentioned_by_its_whole_name_only() {
        assert!(mentions("link: turret1@if2:", "turret1"));
        assert!(mentions("route: 10.0.0.0/8 dev turret1 scope link", "turret1"));
        assert!(!mentions("link: turret12@if2:", "turret1"));
    }

    #[test]
    fn what_changes_by_itself_is_no_trace() {
        assert_eq!(links("1: lo: <UP> mtu 1\n7: turret0@if2: <UP>"), "lo:\nturret0@if2:");
        assert_eq!(rules("# by X\n*nat\n:INPUT ACCEPT [3:4]\n-A INPUT -j X\nCOMMIT"), "-A INPUT -j X");
        assert_eq!(mounts("proc /proc proc rw 0 0"), "/proc");
    }
}
