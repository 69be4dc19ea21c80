//! Rates and delays as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Bits per second, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    /// That many bits per second; zero counts as one.
    pub const fn bits_per_second(bits: u64) -> Self {
        Self(if bits == 0 { 1 } else { bits })
    }

    /// That many million bits per second.
    pub const fn mbit(millions: u64) -> Self {
        Self::bits_per_second(millions.saturating_mul(1_000_000))
    }

    /// Whole bytes that pass in `time`.
    pub fn bytes_in(self, time: Duration) -> u64 {
        let bytes = u128::from(self.0).saturating_mul(time.as_nanos()) / 8_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// How long `bytes` take.
    pub fn time_for(self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 8_000_000_000 / u128::from(self.0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bits if bits >= 1_000_000 => write!(f, "{} Mbit/s", bits as f64 / 1e6),
            bits if bits >= 1_000 => write!(f, "{} kbit/s", bits as f64 / 1e3),
            bits => write!(f, "{bits} bit/s"),
        }
    }
}

/// Not a quantity of the kind asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no {kind}: write a number and a unit, {units}")]
pub struct ParseUnitError {
    given: String,
    kind: &'static str,
    units: &'static str,
}

impl FromStr for Rate {
    type Err = ParseUnitError;

    /// `10mbit`, `512 kbit/s`, `1.5Gbit`.
    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let units = [("bit", 1.0), ("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];
        let lower = text.to_ascii_lowercase();
        let bare = lower.strip_suffix("/s").unwrap_or(&lower);
        match quantity(bare, &units) {
            Some(bits) if (1.0..=1e12).contains(&bits) => Ok(Self(bits as u64)),
            _ => Err(ParseUnitError {
                given: text.to_owned(),
                kind: "rate",
                units: "bit, kbit, mbit or gbit (per second)",
            }),
        }
    }
}

/// A delay: `50ms`, `0.2 s`, `300us`; an hour at most.
pub fn parse_delay(text: &str) -> Result<Duration, ParseUnitError> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    match quantity(text, &units) {
        Some(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(ParseUnitError {
            given: text.to_owned(),
            kind: "delay",
            units: "us, ms or s",
        }),
    }
}

fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read() {
        for (text, bits) in [
            ("10mbit", 10_000_000),
            ("512 kbit/s", 512_000),
            ("1.5Gbit", 1_500_000_000),
            ("1bit", 1),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bits)), "{text}");
        }
        for bad in [
            "",
            "10",
            "mbit",
            "-1mbit",
            "0bit",
            "1.2.3mbit",
            "10mb",
            "9999999gbit",
        ] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
        assert_eq!(parse_delay("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_delay("0.2 s"), Ok(Duration::from_millis(200)));
        assert_eq!(parse_delay("0us"), Ok(Duration::ZERO));
        for bad in ["", "50", "5min", "-1ms", "4000s"] {
            assert!(parse_delay(bad).is_err(), "{bad}");
        }
        assert_eq!(Rate::mbit(10).to_string(), "10 Mbit/s");
    }

    #[test]
    fn bytes_and_time_agree() {
        let rate = Rate::mbit(10);
        assert_eq!(rate.time_for(1_000_000), Duration::from_millis(800));
        assert_eq!(rate.bytes_in(Duration::from_millis(800)), 1_000_000);
        // Nothing overflows at the ends.
        assert!(Rate::bits_per_second(0).time_for(u64::MAX) > Duration::from_secs(1));
        assert_eq!(
            Rate::bits_per_second(u64::MAX).bytes_in(Duration::MAX),
            u64::MAX
        );
    }
}
