//! Sizes and times, as a person says them.

use std::time::Duration;

use site::recording::{LONGEST_TURN, SHORTEST_TURN};

/// A number of bytes as `4096`, `500M`, `1.5GiB`; units are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let bad = || format!("{text:?} is no size; try 500M or 20G");
    let number: f64 = number.trim().parse().map_err(|_| bad())?;
    let unit = unit.to_ascii_lowercase();
    let letter = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let power = match letter {
        "" if unit != "ib" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(bad()),
    };
    let bytes = number * 1024_f64.powi(power);
    if (0.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(format!("{text:?} is out of range"))
    }
}

/// A time as `90`, `90s`, `2m` or `1500ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no time; try 90s"))?;
    let scale = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "w" => 604_800.0,
        _ => {
            return Err(format!(
                "{unit:?} is no unit of time; use ms, s, m, h, d or w"
            ));
        }
    };
    Duration::try_from_secs_f64(number * scale).map_err(|_| format!("{text:?} is out of range"))
}

/// How long a guest's programs may run before others do.
pub(crate) fn turn(text: &str) -> Result<Duration, String> {
    let turn = duration(text)?;
    if (SHORTEST_TURN..=LONGEST_TURN).contains(&turn) {
        Ok(turn)
    } else {
        Err(format!(
            "a turn of {text} is out of range; take one of {SHORTEST_TURN:?} to {LONGEST_TURN:?}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_have_bounds() {
        assert_eq!(turn("400ms"), Ok(Duration::from_millis(400)));
        assert_eq!(turn("1s"), Ok(LONGEST_TURN));
        for bad in ["", "1ms", "2s"] {
            assert!(turn(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("30d"), Ok(Duration::from_secs(2_592_000)));
        assert_eq!(duration("8w"), Ok(Duration::from_secs(4_838_400)));
        for bad in ["", "s", "-1s", "1y", "1e400s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("500M"), Ok(500 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("2 tb"), Ok(2 << 40));
        for bad in ["", "G", "-1G", "1X", "1iB", "NaN", "9e9T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
