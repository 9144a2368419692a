//! The fleet view as one page without scripts. Pure. Whatever came from outside is escaped where it is written.

use std::fmt::{self, Display, Write};

use turret_crds::report::{ArtifactState, BaseReport, LensReport, SwitchReport, TierReport};

use super::{Filter, Page, Report, WorkerRow, said};
use crate::controllers::placement::status::human_bytes;

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><title>Turret: fleet</title><style>\
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em}table{border-collapse:collapse;margin:.3em 0 1em}\
th,td{border:1px solid #8884;padding:.2em .6em;text-align:left;vertical-align:top}td.n{text-align:right}\
.bad{color:#b00}h2{font-size:1.1em;margin:1.2em 0 .2em}input{margin-right:1em}</style><h1>Fleet</h1>";

/// A text in which nothing means markup.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '&' => self.0.write_str("&amp;")?,
                '<' => self.0.write_str("&lt;")?,
                '>' => self.0.write_str("&gt;")?,
                '"' => self.0.write_str("&quot;")?,
                '\'' => self.0.write_str("&#39;")?,
                c => self.0.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The page as HTML.
pub fn render(page: &Page<'_>, filter: &Filter) -> String {
    let mut html = String::from(HEAD);
    write_page(&mut html, page, filter).expect("writing to a string cannot fail");
    html
}

fn write_page(html: &mut String, page: &Page<'_>, filter: &Filter) -> fmt::Result {
    html.write_str("<form>")?;
    for (name, value) in
        [("namespace", &filter.namespace), ("placement", &filter.placement), ("lens", &filter.lens)]
    {
        let value = Escaped(said(value).unwrap_or_default());
        write!(html, "<label>{name} <input name={name} value=\"{value}\"></label>")?;
    }
    write!(html, "<button>show</button></form><p>{} workers", page.total_workers)?;
    if page.workers.len() < page.total_workers {
        write!(html, ", {} on this page", page.workers.len())?;
    }
    if let Some(next) = page.next {
        html.write_str(": <a href=\"?")?;
        for (name, value) in
            [("namespace", &filter.namespace), ("placement", &filter.placement), ("lens", &filter.lens)]
        {
            if let Some(value) = said(value) {
                write!(html, "{name}={}&amp;", InQuery(value))?;
            }
        }
        for (name, value) in [("workers", filter.workers), ("lenses", filter.lenses)] {
            if let Some(value) = value {
                write!(html, "{name}={value}&amp;")?;
            }
        }
        write!(html, "after={}\">next</a>", InQuery(next))?;
    }
    html.write_str("</p>")?;
    page.workers.iter().try_for_each(|worker| write_worker(html, worker))
}

/// A value of a query.
struct InQuery<'a>(&'a str);

impl Display for InQuery<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => f.write_char(byte.into())?,
                byte => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

fn write_worker(html: &mut String, worker: &WorkerRow<'_>) -> fmt::Result {
    write!(html, "<h2>{}</h2><p>placement {}, ", Escaped(worker.id), Escaped(worker.placement))?;
    let Some(report) = &worker.report else {
        let why = worker.lost.unwrap_or("it has not spoken yet");
        return write!(html, "<span class=bad>{}: {}</span></p>", worker.link, Escaped(why));
    };
    let state = &report.state;
    let ready = match (state.ready, state.draining) {
        (_, true) => "draining",
        (true, false) => "ready",
        (false, false) => "not ready",
    };
    write!(html, "{ready}, {} rows run and {} wait", state.running_rows, state.waiting_rows)?;
    if let Some(document) = &state.document {
        write!(html, ", document {}", document.sequence)?;
    }
    if let Some(base) = &state.active_base {
        write!(html, ", active base {}", Escaped(base))?;
    }
    let advised = state.preferred_base.as_ref().filter(|base| state.active_base.as_ref() != Some(*base));
    if let Some(base) = advised {
        write!(html, ", advised base {}", Escaped(base))?;
    }
    write!(
        html,
        ", {} switches, {} evictions, version {}, {}</p>",
        state.switches,
        state.evictions,
        Escaped(&report.worker.version),
        Escaped(&report.worker.device.name)
    )?;
    if let Some(switch) = &state.switch {
        write_switch(html, switch)?;
    }
    if let Some(short) = &state.cannot_fit {
        write!(html, "<p class=bad>{}</p>", Escaped(&short.message))?;
    }
    write_tiers(html, &state.tiers)?;
    write_bases(html, report.bases)?;
    write_lenses(html, report)
}

fn write_switch(html: &mut String, switch: &SwitchReport) -> fmt::Result {
    write!(
        html,
        "<p>switch to {}: {:?}, {} % in memory, {} requests wait for it</p>",
        Escaped(&switch.to),
        switch.phase,
        switch.percent,
        switch.waiting_requests
    )
}

fn write_tiers(html: &mut String, tiers: &[TierReport]) -> fmt::Result {
    html.write_str("<table><tr><th>tier<th>bases<th>lenses<th>lens budget<th>working<th>budget")?;
    for tier in tiers {
        write!(html, "<tr><td>{:?}", tier.tier)?;
        for bytes in
            [tier.base_bytes, tier.lens_bytes, tier.lens_budget_bytes, tier.working_bytes, tier.budget_bytes]
        {
            write!(html, "<td class=n>{}", human_bytes(bytes))?;
        }
    }
    html.write_str("</table>")
}

fn write_bases(html: &mut String, bases: &[BaseReport]) -> fmt::Result {
    html.write_str("<table><tr><th>base<th>groups<th>state<th>tier<th>bytes")?;
    for base in bases {
        let groups = base.groups.join(", ");
        write!(html, "<tr><td>{}<td>{}<td>", Escaped(&base.key), Escaped(groups))?;
        write_state(html, &base.state)?;
        write!(html, "<td>{:?}<td class=n>{}", base.tier, base.bytes.map(human_bytes).unwrap_or_default())?;
    }
    html.write_str("</table>")
}

fn write_lenses(html: &mut String, report: &Report<'_>) -> fmt::Result {
    let counts = &report.lens_counts;
    write!(html, "<p>{} lenses", counts.total)?;
    for (tier, count) in counts.by_tier.iter().rev() {
        write!(html, ", {count} in {tier:?}")?;
    }
    if counts.failed > 0 {
        write!(html, ", <span class=bad>{} failed</span>", counts.failed)?;
    }
    if report.lenses_left_out > 0 {
        write!(html, "; {} are not shown, see ?lenses=NUMBER", report.lenses_left_out)?;
    }
    html.write_str(
        "</p><table><tr><th>lens<th>state<th>tier<th>bytes<th>rows<th>served<th>last used<th>kept<th>last left",
    )?;
    report.lenses.iter().try_for_each(|lens| write_lens(html, lens))?;
    html.write_str("</table>")
}

fn write_lens(html: &mut String, lens: &LensReport) -> fmt::Result {
    write!(html, "<tr><td>{}:{}<td>", Escaped(&lens.group), Escaped(&lens.name))?;
    write_state(html, &lens.state)?;
    let bytes = lens.bytes.map(human_bytes).unwrap_or_default();
    write!(html, "<td>{:?}<td class=n>{bytes}<td class=n>{}", lens.tier, lens.active_rows)?;
    write!(html, "<td class=n>{}<td>{}<td>", lens.served, lens.last_used.map(time).unwrap_or_default())?;
    if lens.assigned {
        html.write_str("assigned ")?;
    }
    if lens.pinned {
        html.write_str("pinned ")?;
    }
    if lens.leases > 0 {
        write!(html, "{} leases", lens.leases)?;
    }
    html.write_str("<td>")?;
    match &lens.last_eviction {
        Some(left) => write!(html, "{} {:?}: {}", time(left.at), left.reason, Escaped(&left.message)),
        None => Ok(()),
    }
}

fn write_state(html: &mut String, state: &ArtifactState) -> fmt::Result {
    match state {
        ArtifactState::Resolving => html.write_str("being checked"),
        ArtifactState::Loading { percent } => write!(html, "loading, {percent} %"),
        ArtifactState::Ready => html.write_str("ready"),
        ArtifactState::Failed { reason, message, retry_at } => {
            write!(html, "<span class=bad>{reason}: {}</span>", Escaped(message))?;
            match retry_at {
                Some(at) => write!(html, ", again at {}", time(*at)),
                None => Ok(()),
            }
        }
    }
}

/// Seconds since the epoch as people read them; nothing for what is no time.
fn time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use turret_crds::{
        condition::FailureReason,
        report::{Eviction, EvictionReason, Tier},
    };

    use super::*;
    use crate::{
        fleet::Link,
        gateway::fleet_view::{
            page,
            tests::{lens, view, worker},
        },
    };

    #[test]
    fn what_came_from_outside_is_text_and_nothing_else() {
        let evil = "<script>alert('1')</script>\"&";
        let failed = LensReport {
            name: evil.into(),
            state: ArtifactState::Failed {
                reason: FailureReason::Internal,
                message: evil.into(),
                retry_at: Some(1),
            },
            last_eviction: Some(Eviction { reason: EvictionReason::Idle, message: evil.into(), at: 2 }),
            ..lens("x", Tier::Disk, Some(3))
        };
        let view = view(vec![
            worker("lab/a", evil, Link::Open, vec![failed]),
            worker("lab/b", evil, Link::Lost(evil.into()), Vec::new()),
        ]);
        let filter = Filter { placement: Some(evil.into()), workers: Some(1), ..Filter::default() };
        let html = render(&page(&view, &filter), &filter);
        assert!(!html.contains("<script"), "{html}");
        assert!(
            html.contains("value=\"&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&quot;&amp;\""),
            "{html}"
        );
        assert!(html.contains("Internal: &lt;script&gt;"), "{html}");
        assert!(html.contains("again at 1970-01-01T00:00:01Z"), "{html}");
        assert!(html.contains("1970-01-01T00:00:02Z Idle: &lt;script&gt;"), "{html}");
        assert!(html.contains("?placement=%3Cscript%3E"), "{html}");
        assert!(html.contains("after=lab%2Fa\">next"), "{html}");
        let all = Filter::default();
        assert!(render(&page(&view, &all), &all).contains("Lost: &lt;script&gt;"));
    }

    #[test]
    fn a_worker_is_shown_with_its_lenses_counted() {
        let lenses = vec![lens("a", Tier::Device, None), lens("b", Tier::Disk, None)];
        let view = view(vec![worker("lab/a", "shared", Link::Open, lenses)]);
        let filter = Filter { lenses: Some(1), ..Filter::default() };
        let html = render(&page(&view, &filter), &filter);
        for part in ["<h2>lab/a</h2>", "2 lenses, 1 in Device, 1 in Disk; 1 are not shown", "g:a"] {
            assert!(html.contains(part), "{part} in {html}");
        }
        assert!(!html.contains("g:b"));
    }
}
