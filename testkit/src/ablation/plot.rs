//! What each session sends, as a picture: SVG, which a repository can hold and a browser shows.
//!
//! Sessions differ by powers of ten, so the axis is logarithmic: a bar's end can be read, its
//! length can't. A thin line goes from the least repeat to the greatest. The figures are those of
//! the table's first part, a replay-friendly guest with a network.

use super::words::NOT_MEASURED;
use super::{BASE, REPLAY, Results, Setting, Spread, TWIN};

/// What is drawn of each session. The colours stay apart for eyes that confuse some (Okabe, Ito).
const BARS: [Bar; 4] = [
    Bar::new("base", "#9aa0a6", Setting::REFERENCE, BASE),
    Bar::new("replay", "#56b4e9", Setting::REFERENCE, REPLAY),
    Bar::new("replay with a twin", "#0072b2", Setting::REFERENCE, TWIN),
    Bar::new("quick replay with a twin", "#e69f00", Setting::QUICK, TWIN),
];

/// All in pixels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 120.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 62.0;
const BAR: f64 = 13.0;
const BETWEEN_BARS: f64 = 2.0;
const BETWEEN_SESSIONS: f64 = 18.0;
const SESSION: f64 = BARS.len() as f64 * (BAR + BETWEEN_BARS) - BETWEEN_BARS;

struct Bar {
    name: &'static str,
    colour: &'static str,
    setting: Setting,
    strategy: &'static str,
}

impl Bar {
    const fn new(
        name: &'static str,
        colour: &'static str,
        setting: Setting,
        strategy: &'static str,
    ) -> Self {
        Self {
            name,
            colour,
            setting,
            strategy,
        }
    }
}

/// A picture that needs nothing else: no fonts, no style sheet, no script.
pub fn svg(results: &Results) -> String {
    let groups: Vec<(&str, [Option<Spread>; 4])> = results
        .workloads()
        .into_iter()
        .map(|workload| {
            let bars = BARS.each_ref().map(|bar| {
                results.spread(workload, bar.setting, |row| {
                    row.sent(bar.strategy).map(|bytes| bytes as f64)
                })
            });
            (workload, bars)
        })
        .collect();
    let axis = Axis::of(groups.iter().flat_map(|(_, bars)| bars.iter().flatten()));
    let sessions = groups.len().max(1) as f64;
    let height = TOP + sessions * (SESSION + BETWEEN_SESSIONS) + BOTTOM;
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"#202124\">\n\
         <title>Bytes sent by session and strategy</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    picture += &text(
        LEFT,
        26.0,
        "start",
        "Bytes to send, from a replay-friendly guest with a network",
        " font-size=\"16\"",
    );
    legend(&mut picture);
    let Some(axis) = axis else {
        picture += &text(LEFT, TOP + 20.0, "start", NOT_MEASURED, " fill=\"#5f6368\"");
        return picture + "</svg>\n";
    };
    axis.draw(&mut picture, height - BOTTOM);
    for (index, (workload, bars)) in groups.iter().enumerate() {
        let top = TOP + BETWEEN_SESSIONS / 2.0 + index as f64 * (SESSION + BETWEEN_SESSIONS);
        let middle = top + SESSION / 2.0 + 4.0;
        picture += &text(LEFT - 10.0, middle, "end", workload, " font-size=\"13\"");
        for (place, (bar, spread)) in BARS.iter().zip(bars).enumerate() {
            let y = top + place as f64 * (BAR + BETWEEN_BARS);
            draw(&mut picture, &axis, bar, spread.as_ref(), y);
        }
    }
    picture + "</svg>\n"
}

fn draw(picture: &mut String, axis: &Axis, bar: &Bar, spread: Option<&Spread>, y: f64) {
    let (middle, baseline) = (y + BAR / 2.0, y + BAR - 3.0);
    let small = " font-size=\"10\"";
    let Some(spread) = spread else {
        let grey = format!("{small} fill=\"#80868b\" font-style=\"italic\"");
        *picture += &text(LEFT + 5.0, baseline, "start", NOT_MEASURED, &grey);
        return;
    };
    let (from, end, to) = (
        axis.place(spread.min),
        axis.place(spread.median),
        axis.place(spread.max),
    );
    *picture += &format!(
        "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>\n",
        end - LEFT,
        bar.colour
    );
    if spread.count > 1 {
        let (above, below) = (middle - 3.0, middle + 3.0);
        // On a dark bar it is seen by its white border.
        for (colour, width) in [("#ffffff", 3), ("#202124", 1)] {
            *picture += &format!(
                "<path d=\"M{from:.1} {middle:.1}H{to:.1}M{from:.1} {above:.1}V{below:.1}\
                 M{to:.1} {above:.1}V{below:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"{width}\" fill=\"none\"/>\n"
            );
        }
    }
    // A grid line behind the figure would pass for a digit of it.
    let clear = format!("{small} paint-order=\"stroke\" stroke=\"#ffffff\" stroke-width=\"3\"");
    let figure = bytes(spread.median);
    *picture += &text(to + 5.0, baseline, "start", &figure, &clear);
}

fn legend(picture: &mut String) {
    let mut x = LEFT;
    for bar in &BARS {
        *picture += &format!(
            "<rect x=\"{x:.1}\" y=\"41\" width=\"12\" height=\"12\" fill=\"{}\"/>\n",
            bar.colour
        );
        *picture += &text(x + 17.0, 51.0, "start", bar.name, "");
        // About what a letter takes in any sans serif.
        x += 46.0 + bar.name.len() as f64 * 5.6;
    }
}

/// A logarithmic axis of bytes.
struct Axis {
    /// Of the ends, in powers of ten.
    from: f64,
    to: f64,
}

impl Axis {
    /// One on which all has a place. `None` if there is nothing.
    fn of<'a>(spreads: impl Iterator<Item = &'a Spread>) -> Option<Self> {
        let ends = Spread::of(spreads.flat_map(|spread| [spread.min, spread.max]))?;
        // Less than a byte has no place on such an axis; it is drawn as one.
        let (least, most) = (ends.min.max(1.0), ends.max.max(1.0));
        let all: Vec<f64> = ticks().collect();
        // The least bar is to be seen, too.
        let before = all.iter().rev().find(|tick| **tick <= least / 1.5);
        let after = all.iter().find(|tick| **tick >= most);
        Some(Self {
            from: before.copied().unwrap_or(0.5).log10(),
            to: after.copied().unwrap_or(most).log10(),
        })
    }

    /// Where so many bytes are, in pixels.
    fn place(&self, bytes: f64) -> f64 {
        let part = (bytes.max(1.0).log10() - self.from) / (self.to - self.from);
        LEFT + part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    fn draw(&self, picture: &mut String, bottom: f64) {
        let shown = |tick: &f64| (self.from - 1e-9..=self.to + 1e-9).contains(&tick.log10());
        // Over many powers of ten the labels between them would run into each other.
        let each = self.to - self.from < 4.0;
        for tick in ticks().filter(shown) {
            let power = tick.log10().fract().abs() < 1e-9;
            let (x, colour) = if power {
                (self.place(tick), "#bdc1c6")
            } else {
                (self.place(tick), "#e8eaed")
            };
            *picture += &format!("<path d=\"M{x:.1} {TOP}V{bottom:.1}\" stroke=\"{colour}\"/>\n");
            if power || each {
                *picture += &text(x, bottom + 18.0, "middle", &round_bytes(tick), "");
            }
        }
        *picture += &format!("<path d=\"M{LEFT} {TOP}V{bottom:.1}\" stroke=\"#5f6368\"/>\n");
        let note = "bytes of all images and of the log, on a logarithmic axis; median of the \
                    repeats, the line from the least to the greatest";
        *picture += &text(LEFT, bottom + 42.0, "start", note, " fill=\"#5f6368\"");
    }
}

/// 1, 2, 5, 10, 20 bytes and so on to 500 TB.
fn ticks() -> impl Iterator<Item = f64> {
    (0..15).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(power)))
}

/// What [`bytes`] says, without zeros that say nothing: for ticks.
pub(super) fn round_bytes(figure: f64) -> String {
    let text = bytes(figure);
    match text.split_once(' ') {
        Some((figure, unit)) if figure.contains('.') => {
            let figure = figure.trim_end_matches('0').trim_end_matches('.');
            format!("{figure} {unit}")
        }
        _ => text,
    }
}

/// In units of 1000, with three digits.
pub(super) fn bytes(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    // What would be rounded up to 1000 belongs to the next unit.
    let unit = units
        .iter()
        .enumerate()
        .find(|(power, _)| bytes < 999.5 * 1000_f64.powf(*power as f64))
        .map_or(units.len() - 1, |(power, _)| power);
    let figure = bytes / 1000_f64.powf(unit as f64);
    let digits = match figure {
        _ if unit == 0 => 0,
        small if small < 9.995 => 2,
        middle if middle < 99.95 => 1,
        _ => 0,
    };
    format!("{figure:.digits$} {}", units[unit])
}

fn text(x: f64, y: f64, anchor: &str, text: &str, more: &str) -> String {
    let text = escape(text);
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{text}</text>\n")
}

/// As text in XML; what XML has no place for is left out.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            control if control.is_control() => {}
            '\u{fffe}' | '\u{ffff}' => {}
            _ => escaped.push(letter),
        }
    }
    escaped
}
