//! Memory over time, as a picture. Pure.

use std::fmt::Write as _;

/// Size of the picture.
const SIZE: (f64, f64) = (720.0, 240.0);
/// Room for the numbers left of the plot and below it, and for lines above and right of it.
const MARGIN: (f64, f64) = (64.0, 28.0);

/// An SVG of resident memory: seconds, and bytes. Nothing of fewer than two samples.
pub(super) fn memory(samples: &[(f64, u64)]) -> Option<String> {
    let (last, _) = *samples.last()?;
    let most = samples.iter().map(|(_, bytes)| *bytes).max()? as f64 / MIB;
    if samples.len() < 2 || last <= 0.0 || most <= 0.0 {
        return None;
    }
    // From nothing on: a plot that begins elsewhere shows growth where there is none.
    let top = round_up(most);
    let (width, height) = (SIZE.0 - 2.0 * MARGIN.0, SIZE.1 - 2.0 * MARGIN.1);
    let x = |seconds: f64| MARGIN.0 + width * seconds / last;
    let y = |mib: f64| MARGIN.1 + height * (1.0 - mib / top);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{}\" y=\"16\">resident memory of the operator, MiB, over seconds of edits</text>\n",
        SIZE.0, SIZE.1, MARGIN.0
    );
    for share in [0.0, 0.5, 1.0] {
        let (at, right) = (y(top * share), SIZE.0 - MARGIN.0);
        // Writing to a text cannot fail.
        let _ = writeln!(
            svg,
            "<line x1=\"{:.1}\" y1=\"{at:.1}\" x2=\"{right:.1}\" y2=\"{at:.1}\" stroke=\"#ccc\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0}</text>",
            MARGIN.0,
            MARGIN.0 - 6.0,
            at + 4.0,
            top * share
        );
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}</text>",
            x(last * share),
            SIZE.1 - 10.0,
            last * share
        );
    }
    let points: Vec<String> = samples
        .iter()
        .map(|(seconds, bytes)| format!("{:.1},{:.1}", x(*seconds), y(*bytes as f64 / MIB)))
        .collect();
    let _ =
        writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"#06c\"/>\n</svg>", points.join(" "));
    Some(svg)
}

const MIB: f64 = 1_048_576.0;

/// The next number that is easy to read: 1, 2 or 5 with zeroes.
fn round_up(number: f64) -> f64 {
    let power = 10_f64.powf(number.log10().floor());
    let digits = [1.0, 2.0, 5.0, 10.0];
    digits.into_iter().map(|digit| digit * power).find(|round| *round >= number).unwrap_or(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_a_point_within_the_frame() {
        let svg = memory(&[(0.0, 0), (5.0, 100 << 20), (10.0, 200 << 20)]).unwrap();
        assert!(svg.contains("points=\"64.0,212.0 360.0,120.0 656.0,28.0\""), "{svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        for number in [">0<", ">100<", ">200<", ">5<", ">10<"] {
            assert!(svg.contains(number), "{number} in {svg}");
        }
    }

    #[test]
    fn too_little_is_no_picture() {
        assert_eq!(memory(&[]), None);
        assert_eq!(memory(&[(0.0, 1 << 20)]), None);
        assert_eq!(memory(&[(0.0, 0), (1.0, 0)]), None);
    }

    #[test]
    fn the_frame_ends_at_a_round_number() {
        assert_eq!([1.0, 180.0, 200.0, 390.0, 700.0].map(round_up), [1.0, 200.0, 200.0, 500.0, 1000.0]);
    }
}
