//! Figures as a reader wants them: grouped digits, one decimal, what is not there said so.

use super::Spread;

pub(super) const NOT_MEASURED: &str = "not measured";

/// A whole number, with commas between thousands.
pub(super) fn count(figure: f64) -> String {
    let digits = format!("{:.0}", figure.abs());
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if figure.is_sign_negative() && digits != "0" {
        format!("−{text}")
    } else {
        text
    }
}

/// With one decimal, none if it is 0.
pub(super) fn tenths(figure: f64) -> String {
    let text = format!("{:.1}", figure.abs());
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if figure.is_sign_negative() && text != "0" {
        format!("−{text}")
    } else {
        text.to_owned()
    }
}

/// With one decimal in any case, so that columns and comparisons read alike.
pub(super) fn one_decimal(figure: f64) -> String {
    match format!("{:.1}", figure.abs()).as_str() {
        text if figure.is_sign_negative() && text != "0.0" => format!("−{text}"),
        text => text.to_owned(),
    }
}

/// The same with its sign.
pub(super) fn signed(figure: f64) -> String {
    match one_decimal(figure) {
        text if text.starts_with('−') || text == "0.0" => text,
        text => format!("+{text}"),
    }
}

pub(super) fn percent_of(figure: f64) -> String {
    format!("{} %", one_decimal(figure))
}

/// How many times as much.
pub(super) fn multiple(figure: f64) -> String {
    format!("×{figure:.2}")
}

/// A median and, where figures read apart, the least and the greatest.
pub(super) fn spread(spread: Option<Spread>, write: fn(f64) -> String, unit: &str) -> String {
    let Some(Spread {
        median, min, max, ..
    }) = spread
    else {
        return NOT_MEASURED.to_owned();
    };
    let (middle, least, most) = (write(median), write(min), write(max));
    if least == middle && most == middle {
        return format!("{middle}{unit}");
    }
    // A dash beside a sign can't be read.
    let to = if least.contains(['−', '+']) || most.contains(['−', '+']) {
        " to "
    } else {
        "–"
    };
    format!("{middle}{unit} ({least}{to}{most})")
}

pub(super) fn counts(figures: Option<Spread>) -> String {
    spread(figures, count, "")
}

pub(super) fn decimals(figures: Option<Spread>) -> String {
    spread(figures, one_decimal, "")
}

pub(super) fn percents(figures: Option<Spread>) -> String {
    spread(figures, one_decimal, " %")
}

pub(super) fn multiples(figures: Option<Spread>) -> String {
    match figures {
        None => NOT_MEASURED.to_owned(),
        _ => format!("×{}", spread(figures, |figure| format!("{figure:.2}"), "")),
    }
}

/// `None` of nothing.
pub(super) fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// How many sessions, in words that fit any number.
pub(super) fn sessions(number: usize) -> String {
    match number {
        1 => "1 session".to_owned(),
        _ => format!("{number} sessions"),
    }
}

pub(super) const fn reached(is: bool) -> &'static str {
    if is { "reached" } else { "not reached" }
}

/// Names with their figures, of those that `which` picks.
pub(super) fn named(
    figures: &[(&str, f64)],
    which: impl Fn(f64) -> bool,
    write: fn(f64) -> String,
) -> String {
    let picked = figures.iter().filter(|(_, figure)| which(*figure));
    let texts: Vec<String> = picked
        .map(|(name, figure)| format!("{} ({})", escape(name), write(*figure)))
        .collect();
    texts.join(", ")
}

/// As plain text of one line in Markdown, in a table or not.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' | '\r' => escaped.push(' '),
            '<' => escaped.push_str("&lt;"),
            '&' => escaped.push_str("&amp;"),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' => escaped.extend(['\\', letter]),
            _ => escaped.push(letter),
        }
    }
    escaped
}

/// A table in Markdown, the first columns of names and the others of figures.
pub(super) struct Table {
    text: String,
}

impl Table {
    pub(super) fn new(names: usize, heads: &[&str]) -> Self {
        let rules: Vec<&str> = (0..heads.len())
            .map(|at| if at < names { "---" } else { "---:" })
            .collect();
        let mut table = Self {
            text: String::new(),
        };
        table.line(heads);
        table.line(&rules);
        table
    }

    pub(super) fn line(&mut self, cells: &[impl AsRef<str>]) {
        for cell in cells {
            self.text += "| ";
            self.text += cell.as_ref();
            self.text.push(' ');
        }
        self.text += "|\n";
    }

    pub(super) fn text(self) -> String {
        self.text
    }
}
