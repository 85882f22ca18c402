//! Histories as SVG, drawn by plotters at the size at which they are shown.
//!
//! The colours are those of Okabe and Ito, which the colour-blind can tell apart. No state is shown by its colour alone.

use super::history;
use super::lanes::{self, Doing, Lane, Lanes, Span};
use crate::pool::WorkerStats;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::time::{Duration, Instant};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORANGE: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const SKY: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const PURPLE: RGBColor = RGBColor(0xcc, 0x79, 0xa7);
/// Of deaths and failures, and nothing else.
const VERMILION: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const PALE_VERMILION: RGBColor = RGBColor(0xfb, 0xe5, 0xd6);
const GREY: RGBColor = RGBColor(0x8a, 0x8a, 0x8a);
const PALE_GREY: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const FUNCTIONS: [RGBColor; 5] = [BLUE, ORANGE, GREEN, SKY, PURPLE];

/// plotters writes text at 1/1.24 of this; a letter is about `LETTER` wide then.
const TEXT: i32 = 15;
const LETTER: i32 = 8;
/// The heights of a lane and of what is drawn in it, of the axis below, and of a curve.
const ROW: i32 = 26;
const BAR: i32 = 18;
const AXIS: i32 = 26;
const CURVE: u32 = 190;
/// The least width of a death, and that with its label.
const MARK: i32 = 9;
const MARK_WITH_LABEL: i32 = 38;
/// Pictures less wide than this have short labels.
const NARROW: u32 = 560;

/// Draws on white; an error becomes a text in the place of the picture.
fn svg(width: u32, height: u32, draw: impl FnOnce(&Area) -> Drawn) -> String {
    let mut text = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
        area.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&area)).and_then(|()| Ok(area.present()?))
    };
    match drawn {
        Ok(()) => text,
        Err(error) => format!("<p>This cannot be drawn: {}</p>", escaped(&error.to_string())),
    }
}

fn style(colour: &RGBColor, horizontal: HPos) -> TextStyle<'_> {
    TextStyle::from(("sans-serif", TEXT).into_font()).color(colour).pos(Pos::new(horizontal, VPos::Center))
}

fn width_of(text: &str) -> i32 {
    text.chars().count() as i32 * LETTER
}

/// The colour and the letter of a function, by its place among those that were seen.
pub(super) fn function_mark(at: usize) -> (String, char) {
    let RGBColor(red, green, blue) = FUNCTIONS[at % FUNCTIONS.len()];
    (format!("#{red:02X}{green:02X}{blue:02X}"), (b'A' + (at % 26) as u8) as char)
}

fn text_on(colour: RGBColor) -> RGBColor {
    if colour == BLUE { WHITE } else { BLACK }
}

fn short_name(worker: &str, width: u32) -> String {
    if width < NARROW { worker.replacen("PoolWorker-", "W-", 1) } else { worker.to_string() }
}

fn gutter(width: u32) -> i32 {
    if width < NARROW { 52 } else { 122 }
}

/// A row for each worker: what it did in the last minute.
pub(super) fn lanes(now: Instant, lanes: &Lanes, functions: &[&'static str], width: u32) -> String {
    let height = lanes.len() as i32 * ROW + AXIS;
    let rows = Rows { now, functions, left: gutter(width), right: width as i32 - 14 };
    svg(width, height as u32, |area| {
        rows.axis(area, height - AXIS)?;
        for (at, (name, lane)) in lanes.iter().enumerate() {
            rows.lane(area, at as i32 * ROW, &short_name(name, width), lane)?;
        }
        Ok(())
    })
}

struct Rows<'a> {
    now: Instant,
    functions: &'a [&'static str],
    left: i32,
    right: i32,
}

impl Rows<'_> {
    fn x(&self, at: Instant) -> i32 {
        let ago = self.now.saturating_duration_since(at).as_secs_f64() / lanes::WINDOW.as_secs_f64();
        self.right - ((self.right - self.left) as f64 * ago.min(1.0)) as i32
    }

    fn axis(&self, area: &Area, top: i32) -> Drawn {
        for quarter in 0..=4 {
            let x = self.left + (self.right - self.left) * quarter / 4;
            area.draw(&PathElement::new(vec![(x, 0), (x, top + 4)], PALE_GREY))?;
            let text = match lanes::WINDOW.as_secs() * (4 - quarter as u64) / 4 {
                0 => "now".to_string(),
                seconds => format!("-{seconds} s"),
            };
            let side = if quarter == 4 { HPos::Right } else { HPos::Center };
            let x = if quarter == 4 { x + 12 } else { x };
            area.draw(&Text::new(text, (x, top + 15), style(&BLACK, side)))?;
        }
        Ok(())
    }

    fn lane(&self, area: &Area, top: i32, name: &str, lane: &Lane) -> Drawn {
        let has_died = lane.died().is_some();
        if has_died {
            let background = [(0, top + 1), (self.right, top + ROW - 1)];
            area.draw(&Rectangle::new(background, PALE_VERMILION.filled()))?;
        }
        let label = if has_died { format!("× {name}") } else { name.to_string() };
        area.draw(&Text::new(label, (self.left - 6, top + ROW / 2), style(&BLACK, HPos::Right)))?;
        let marks = self.marks(lane);
        for span in lane.spans.iter().filter(|span| span.doing != Doing::Dead) {
            self.span(area, top, span, &marks)?;
        }
        marks.iter().try_for_each(|mark| death(area, top, *mark))
    }

    fn span(&self, area: &Area, top: i32, span: &Span, marks: &[(i32, i32)]) -> Drawn {
        let (from, to) = (self.x(span.from), self.x(span.to).max(self.x(span.from) + 1));
        let (above, below) = (top + (ROW - BAR) / 2, top + (ROW + BAR) / 2);
        let function = match span.doing {
            Doing::Item(function) => Some(function),
            Doing::Items(function) => function,
            Doing::Nothing | Doing::Dead => {
                let line = vec![(from, top + ROW / 2), (to, top + ROW / 2)];
                return Ok(area.draw(&PathElement::new(line, GREY))?);
            }
        };
        let at = function.and_then(|function| self.functions.iter().position(|known| *known == function));
        let colour = at.map_or(GREY, |at| FUNCTIONS[at % FUNCTIONS.len()]);
        let is_one = matches!(span.doing, Doing::Item(_));
        // A gap divides items that follow each other.
        let to = if is_one && to - from > 3 { to - 1 } else { to };
        let body = if is_one { colour.filled() } else { colour.mix(0.25).filled() };
        area.draw(&Rectangle::new([(from, above), (to, below)], body))?;
        if !is_one {
            for y in [above, above + 3, below - 3, below] {
                area.draw(&PathElement::new(vec![(from, y), (to, y)], colour))?;
            }
        }
        let Some(at) = at else { return Ok(()) };
        let (letter, name) = (function_mark(at).1.to_string(), short_function(self.functions[at]));
        let long = format!("{letter} {name}");
        let is_covered = marks.iter().any(|(start, end)| *start < to && from < *end);
        let fits = |text: &str| to - from > width_of(text) + 6 && !is_covered;
        let text = [long, letter].into_iter().find(|text| fits(text));
        let ink = if is_one { text_on(colour) } else { BLACK };
        if let Some(text) = text {
            area.draw(&Text::new(text, (from + 4, top + ROW / 2), style(&ink, HPos::Left)))?;
        }
        Ok(())
    }

    /// From where to where the deaths of a lane are drawn.
    fn marks(&self, lane: &Lane) -> Vec<(i32, i32)> {
        let (mut marks, mut limit) = (Vec::new(), self.right);
        // The latest first, which has the most room.
        for span in lane.spans.iter().rev().filter(|span| span.doing == Doing::Dead) {
            let (from, to) = (self.x(span.from), self.x(span.to));
            let from = if marks.is_empty() { from.min(limit - MARK_WITH_LABEL) } else { from.min(limit - MARK) };
            let wanted = if limit - from >= MARK_WITH_LABEL { MARK_WITH_LABEL } else { MARK };
            marks.push((from.max(self.left), to.max(from + wanted).min(limit)));
            limit = from;
            if limit - MARK < self.left {
                break;
            }
        }
        marks
    }
}

/// Hatched, and with a word where that fits.
fn death(area: &Area, top: i32, (from, to): (i32, i32)) -> Drawn {
    let (above, below) = (top + (ROW - BAR) / 2, top + (ROW + BAR) / 2);
    area.draw(&Rectangle::new([(from, above), (to, below)], VERMILION.filled()))?;
    let has_label = to - from >= MARK_WITH_LABEL;
    let hatched = if has_label { from + 2..from } else { from..to };
    for x in hatched.step_by(5).filter(|x| x + 5 <= to) {
        area.draw(&PathElement::new(vec![(x, below), (x + 5, above)], BLACK))?;
    }
    area.draw(&Rectangle::new([(from, above), (to, below)], BLACK.stroke_width(1)))?;
    if has_label {
        area.draw(&Text::new("died", (from + 5, top + ROW / 2), style(&BLACK, HPos::Left)))?;
    }
    Ok(())
}

/// `tests::work` of `crate::tests::work`; of closures, the function that has them.
pub(super) fn short_function(path: &str) -> String {
    let path = path.split('<').next().unwrap_or(path);
    let is_closure = path.ends_with("{{closure}}");
    let named = path.rsplit("::").find(|part| !part.starts_with('{')).unwrap_or(path);
    if is_closure { format!("{named}, closure") } else { named.to_string() }
}

/// One line of a picture. Points are minutes and values; a gap divides them.
pub(super) struct Curve {
    pub(super) ink: Ink,
    pub(super) points: Vec<(f64, Option<f64>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    Blue,
    BlueDashed,
    Green,
    GreenDashed,
    Failure,
}

impl Ink {
    fn colour(self) -> RGBColor {
        match self {
            Self::Blue | Self::BlueDashed => BLUE,
            Self::Green | Self::GreenDashed => GREEN,
            Self::Failure => VERMILION,
        }
    }

    fn is_dashed(self) -> bool {
        matches!(self, Self::BlueDashed | Self::GreenDashed | Self::Failure)
    }

    /// A short piece of such a line, for a legend.
    pub(super) fn swatch(self) -> String {
        let RGBColor(red, green, blue) = self.colour();
        let dashes = if self.is_dashed() { " stroke-dasharray=\"5 3\"" } else { "" };
        format!(
            "<svg class=\"swatch\" width=\"26\" height=\"10\" aria-hidden=\"true\"><line x1=\"0\" y1=\"5\" x2=\"26\" y2=\"5\" \
             stroke=\"#{red:02X}{green:02X}{blue:02X}\" stroke-width=\"2.5\"{dashes}/></svg>"
        )
    }
}

/// How the values of curves are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    Count,
    /// Seconds, by their logarithm.
    Time,
}

/// The last minutes, from left to right.
pub(super) fn curves(width: u32, scale: Scale, curves: &[Curve]) -> String {
    let minutes = history::WINDOW.as_secs_f64() / 60.0;
    let values = || curves.iter().flat_map(|curve| curve.points.iter().filter_map(|(_, value)| *value));
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    let (bottom, top) = match scale {
        Scale::Count => (0.0, most.max(1.0) * 1.1),
        Scale::Time if most == 0.0 => (-6.0, 0.0),
        Scale::Time => (least.max(1e-9).log10().floor(), (most.max(1e-9).log10() + 0.05).ceil()),
    };
    let place = |value: f64| if scale == Scale::Time { value.max(1e-9).log10() } else { value };
    svg(width, CURVE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(8)
            .margin_right(20)
            .x_label_area_size(24)
            .y_label_area_size(58)
            .build_cartesian_2d(-minutes..0.0, bottom..top)?;
        let lines = if scale == Scale::Time { ((top - bottom) as usize + 1).min(8) } else { 5 };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(6)
            .y_labels(lines)
            .max_light_lines(0)
            .bold_line_style(PALE_GREY)
            .axis_style(GREY)
            .label_style(("sans-serif", TEXT))
            .x_label_formatter(&|minutes| if minutes.abs() < 0.01 { "now".into() } else { format!("{minutes:.0} min") })
            .y_label_formatter(&|value| match scale {
                Scale::Count => count(*value),
                Scale::Time => time(10_f64.powf(*value)),
            })
            .draw()?;
        for Curve { ink, points } in curves {
            let pen = ink.colour().stroke_width(2);
            for piece in points.split(|(_, value)| value.is_none()) {
                let piece: Vec<_> = piece.iter().filter_map(|(x, y)| Some((x.max(-minutes), place((*y)?)))).collect();
                match (&piece[..], ink.is_dashed()) {
                    ([], _) => {}
                    ([one], _) => _ = chart.draw_series([Circle::new(*one, 2, ink.colour().filled())])?,
                    (_, true) => _ = chart.draw_series(DashedLineSeries::new(piece, 5, 3, pen))?,
                    (_, false) => _ = chart.draw_series(LineSeries::new(piece, pen))?,
                }
            }
        }
        Ok(())
    })
}

/// A bar for each worker.
pub(super) fn memory(width: u32, workers: &[&WorkerStats]) -> String {
    let (left, room) = (gutter(width), if width < NARROW { 128 } else { 190 });
    let right = width as i32 - room;
    let most = workers.iter().map(|worker| worker.peak.max(worker.resident)).max().unwrap_or(0).max(1);
    let x = |bytes: u64| left + ((right - left) as f64 * bytes as f64 / most as f64) as i32;
    svg(width, workers.len().max(1) as u32 * ROW as u32, |area| {
        for (at, worker) in workers.iter().enumerate() {
            let (top, middle) = (at as i32 * ROW, at as i32 * ROW + ROW / 2);
            let label = Text::new(short_name(&worker.name, width), (left - 6, middle), style(&BLACK, HPos::Right));
            area.draw(&label)?;
            let bar = |to: i32| [(left, top + (ROW - BAR) / 2), (to, top + (ROW + BAR) / 2)];
            area.draw(&Rectangle::new(bar(x(worker.peak)), PALE_GREY.filled()))?;
            area.draw(&Rectangle::new(bar(x(worker.resident)), SKY.filled()))?;
            area.draw(&Rectangle::new(bar(x(worker.peak)), GREY.stroke_width(1)))?;
            let text = format!("{} of {}", bytes(worker.resident), bytes(worker.peak));
            area.draw(&Text::new(text, (right + 8, middle), style(&BLACK, HPos::Left)))?;
        }
        Ok(())
    })
}

/// `text` as text of HTML, also within an attribute.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// `12`, `3.4 k`, `5.6 M`.
pub(super) fn count(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1} M", v / 1e6),
        v if v >= 1e4 => format!("{:.0} k", v / 1e3),
        v if v >= 1e3 => format!("{:.1} k", v / 1e3),
        v if v >= 10.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v => format!("{v:.1}"),
    }
}

/// Seconds, with two digits.
pub(super) fn time(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 0.9995 => (s, "s"),
        s if s >= 0.9995e-3 => (s * 1e3, "ms"),
        s if s >= 0.9995e-6 => (s * 1e6, "µs"),
        s => (s * 1e9, "ns"),
    };
    if value >= 9.95 || (value - value.round()).abs() < 0.05 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

pub(super) fn duration(time_: Duration) -> String {
    match time_.as_secs() {
        s if s >= 5400 => format!("{:.1} h", s as f64 / 3600.0),
        s if s >= 90 => format!("{:.1} min", s as f64 / 60.0),
        _ => time(time_.as_secs_f64()),
    }
}

pub(super) fn bytes(bytes: u64) -> String {
    match bytes >> 20 {
        mib if mib >= 10_240 => format!("{} GiB", mib >> 10),
        0 => format!("{} KiB", bytes >> 10),
        mib => format!("{mib} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let counts = [0.0, 0.25, 7.0, 12.5, 1234.0, 45_678.0, 2.5e6].map(count);
        assert_eq!(counts, ["0", "0.2", "7", "12", "1.2 k", "46 k", "2.5 M"]);
        let times = [0.0, 1e-6, 2.5e-6, 1e-3, 0.0123, 1.0, 75.0].map(time);
        assert_eq!(times, ["0 ns", "1 µs", "2.5 µs", "1 ms", "12 ms", "1 s", "75 s"]);
        assert_eq!([100, 9000].map(|s| duration(Duration::from_secs(s))), ["1.7 min", "2.5 h"]);
        assert_eq!([5 << 10, 7 << 20, 20 << 30].map(bytes), ["5 KiB", "7 MiB", "20 GiB"]);
    }

    #[test]
    fn a_function_is_named_by_the_last_of_its_path() {
        assert_eq!(short_function("primes::count"), "count");
        assert_eq!(short_function("primes::count<a::B, c::D>"), "count");
        assert_eq!(short_function("primes::main::{{closure}}::{{closure}}"), "main, closure");
    }

    #[test]
    fn nothing_is_drawn_without_a_point() {
        assert!(curves(400, Scale::Time, &[]).starts_with("<svg"));
        assert!(curves(400, Scale::Count, &[Curve { ink: Ink::Blue, points: Vec::new() }]).starts_with("<svg"));
        assert!(memory(400, &[]).starts_with("<svg"));
        assert!(lanes(Instant::now(), &Lanes::default(), &[], 400).starts_with("<svg"));
    }
}
