//! A log as JSON lines, for people and for other programs.
//!
//! By default nothing in it says what was typed: keys that make text are `"masked"`, and of
//! anchors only the number of tiles is given, since the hashes of a text field can be compared
//! with those of guessed text. The rhythm of typing stays, and tells a little by itself.

use std::io::{self, Write};
use std::time::UNIX_EPOCH;

use serde_json::{Value, json};

use crate::key::hex;
use crate::{Event, Header, Record};

/// Whether an export shows what was typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masking {
    /// Keys that make text and hashes of what the screen showed are left out.
    Masked,
    /// Everything, passwords too.
    Plain,
}

/// Writes a line for the header, if one is given, and one for each record.
///
/// `{"log":{"vm":"<hex>","generation":n,"base_position":n,"created_ms":n}}`, then
/// `{"at_us":n,"type":"key","code":n or "masked","down":true}` and so on, with the types and
/// fields of [`Event`].
pub fn export_json_lines(
    out: &mut impl Write,
    header: Option<&Header>,
    records: &[Record],
    masking: Masking,
) -> io::Result<()> {
    if let Some(header) = header {
        let created = header
            .created
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let line = json!({"log": {
            "vm": hex(&header.id.vm),
            "generation": header.id.generation,
            "base_position": header.id.base_position,
            "created_ms": created.as_millis() as u64,
        }});
        writeln!(out, "{line}")?;
    }
    for record in records {
        writeln!(out, "{}", line(record, masking)?)?;
    }
    Ok(())
}

fn line(record: &Record, masking: Masking) -> io::Result<Value> {
    let mut line = json!({"at_us": record.at.micros});
    let mut event = serde_json::to_value(&record.event)?;
    if masking == Masking::Masked {
        match &record.event {
            Event::Key { code, .. } if Event::makes_text(*code) => event["code"] = json!("masked"),
            Event::Anchor(anchor) => event["tiles"] = json!(anchor.tiles.len()),
            _ => {}
        }
    }
    if let (Value::Object(line), Value::Object(event)) = (&mut line, event) {
        line.extend(event);
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Anchor, GuestTime, Region};

    fn exported(events: Vec<Event>, masking: Masking) -> String {
        let records: Vec<_> = events
            .into_iter()
            .map(|event| Record {
                at: GuestTime { micros: 7 },
                event,
            })
            .collect();
        let mut out = Vec::new();
        export_json_lines(&mut out, None, &records, masking).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn typed() -> Vec<Event> {
        let region = Region {
            x: 1,
            y: 2,
            width: 16,
            height: 16,
        };
        vec![
            Event::Key {
                code: 30,
                down: true,
            },
            Event::Key {
                code: 28,
                down: false,
            },
            Event::Anchor(Anchor {
                region,
                tiles: vec![987_654_321],
            }),
            Event::Wheel {
                vertical: -1,
                horizontal: 0,
            },
        ]
    }

    #[test]
    fn what_was_typed_is_masked() {
        let text = exported(typed(), Masking::Masked);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            r#"{"at_us":7,"code":"masked","down":true,"type":"key"}"#
        );
        assert_eq!(
            lines[1],
            r#"{"at_us":7,"code":28,"down":false,"type":"key"}"#
        );
        assert!(lines[2].contains(r#""tiles":1"#) && !text.contains("987654321"));
    }

    #[test]
    fn unless_asked_for() {
        let text = exported(typed(), Masking::Plain);
        assert!(text.contains(r#""code":30"#) && text.contains("987654321"));
        // Without masking a line is a record again.
        for (line, event) in text.lines().zip(typed()) {
            assert_eq!(serde_json::from_str::<Event>(line).unwrap(), event);
        }
    }

    #[test]
    fn all_letters_digits_and_signs_are_masked() {
        let printable = (2..=13).chain(16..=27).chain(30..=41).chain(43..=53);
        for code in printable
            .chain([55, 57, 86, 98, 117, 121, 124])
            .chain(71..=83)
        {
            assert!(Event::makes_text(code), "{code}");
        }
    }
}
