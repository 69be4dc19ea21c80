//! Sessions: what a user does at a desktop, as a text that a person can read and write.
//!
//! One step a line, `#` begins a comment:
//!
//! ```text
//! say  TEXT                     what the user is about to do, for those who watch
//! click X Y                     also: doubleclick, rightclick, move
//! drag X Y X2 Y2
//! wheel X Y up|down CLICKS
//! type "TEXT"                   \n is Enter, \t Tab; as are `repeat N type "TEXT"`
//! key  CHORD                    Return, ctrl+s, alt+F4
//! think TIME                    2s, 500ms: nothing is done
//! since TIME                    nothing is done until so long after the last action
//! quiet [X Y W H] TIME LIMIT    until nothing there has changed for TIME
//! changed [X Y W H] LIMIT       until something there has, since the last action began
//! learn NAME X Y W H            what that part of the screen shows
//! shows NAME X Y LIMIT          until that is shown here, X Y being its top left corner
//! look NAME                     a screenshot, where the caller wants any
//! ```
//!
//! A limit that passes ends the wait, and the session goes on, as a person would. What must not
//! go to the wrong window waits for its window with `changed` and `quiet`; `since` after them makes
//! the pause a fixed one wherever the guest is quick enough.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::robot::keys::Chord;
use crate::robot::{self, Button, Region, Robot, RobotError, Waited};
use crate::user::User;

#[cfg(test)]
mod tests;

/// A quarter of a minute in a terminal and an editor, for tests.
pub const SHORT: &str = include_str!("../sessions/short.txt");

macro_rules! suite {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../sessions/", $name, ".txt")))),+]
    };
}

/// The workload suite, by name; `docs/sessions.md` says what each does.
pub const SUITE: &[(&str, &str)] = suite![
    "writing",
    "spreadsheet",
    "drawing",
    "files",
    "compile",
    "reading",
    "reference",
    "demo",
];

/// One step of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Say(String),
    Move(u16, u16),
    Click(u16, u16, Button),
    DoubleClick(u16, u16),
    Drag((u16, u16), (u16, u16)),
    Wheel {
        x: u16,
        y: u16,
        turn: Button,
        clicks: u32,
    },
    Type(String),
    Key(Chord),
    Think(Duration),
    Since(Duration),
    Quiet {
        region: Option<Region>,
        quiet: Duration,
        limit: Duration,
    },
    Changed {
        region: Option<Region>,
        limit: Duration,
    },
    Learn(String, Region),
    Shows {
        name: String,
        x: u16,
        y: u16,
        limit: Duration,
    },
    Look(String),
}

/// A session that was read without a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    steps: Vec<(usize, Step)>,
    user: User,
}

/// A line of a session that can't be followed.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line} of the session: {fault}")]
pub struct SessionError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong.
    pub fault: String,
}

/// What a session took.
#[derive(Clone, Debug, Default)]
pub struct Played {
    /// From the first step to the end of the last.
    pub time: Duration,
    /// Lines of waits whose limit passed.
    pub limits: Vec<usize>,
}

impl Session {
    /// The session of this name, or in this file.
    ///
    /// # Errors
    /// If there is no such session and no such file, or it can't be followed.
    pub fn named(name: &str) -> std::io::Result<Self> {
        let known = SUITE
            .iter()
            .chain(&[("short", SHORT)])
            .find(|(known, _)| *known == name);
        let text = match known {
            Some((_, text)) => (*text).to_owned(),
            None => std::fs::read_to_string(name).map_err(|error| {
                let kind = error.kind();
                std::io::Error::new(
                    kind,
                    format!("{name} is no session of the suite, and no file: {error}"),
                )
            })?,
        };
        text.parse()
            .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))
    }

    /// The same, done by this user; without it, by a practised one.
    #[must_use]
    pub fn by(self, user: User) -> Self {
        Self { user, ..self }
    }

    /// What it takes if the guest answers everything at once: typing, moving and thinking. Waits
    /// for the guest count with the quiet that they end with.
    pub fn nominal(&self) -> Duration {
        let mut since_action = Duration::ZERO;
        let mut total = Duration::ZERO;
        for (_, step) in &self.steps {
            let time = match step {
                Step::Say(_)
                | Step::Look(_)
                | Step::Changed { .. }
                | Step::Learn(..)
                | Step::Shows { .. } => Duration::ZERO,
                Step::Think(time) => self.user.think(*time),
                Step::Since(time) => time.saturating_sub(since_action),
                Step::Quiet { quiet, .. } => *quiet,
                Step::Type(text) => self.user.key_spacing() * text.len() as u32,
                Step::Wheel { clicks, .. } => robot::CLICK_SPACING * *clicks,
                Step::Key(_) => self.user.key_spacing(),
                Step::Move(..) | Step::Click(..) | Step::DoubleClick(..) | Step::Drag(..) => {
                    POINTER_TRAVEL
                }
            };
            total += time;
            since_action = if step.is_action() {
                Duration::ZERO
            } else {
                since_action + time
            };
        }
        total
    }
}

/// What going somewhere with the pointer takes, roughly: its way is only known when it moves.
const POINTER_TRAVEL: Duration = Duration::from_millis(600);

impl Step {
    /// Whether the guest gets to know of it.
    fn is_action(&self) -> bool {
        matches!(
            self,
            Self::Move(..)
                | Self::Click(..)
                | Self::DoubleClick(..)
                | Self::Drag(..)
                | Self::Wheel { .. }
                | Self::Type(_)
                | Self::Key(_)
        )
    }
}

impl FromStr for Session {
    type Err = SessionError;

    fn from_str(text: &str) -> Result<Self, SessionError> {
        let mut steps: Vec<(usize, Step)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let parsed = parse(line).map_err(|fault| SessionError {
                line: number,
                fault,
            })?;
            for step in &parsed {
                let learned = |name: &String| {
                    let known =
                        |(_, step): &(usize, Step)| matches!(step, Step::Learn(n, _) if n == name);
                    steps.iter().any(known)
                };
                if let Step::Shows { name, .. } = step
                    && !learned(name)
                {
                    return Err(SessionError {
                        line: number,
                        fault: format!("what {name:?} looks like was not learned before"),
                    });
                }
            }
            steps.extend(parsed.into_iter().map(|step| (number, step)));
        }
        Ok(Self {
            steps,
            user: User::default(),
        })
    }
}

fn parse(line: &str) -> Result<Vec<Step>, String> {
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    if word == "repeat" {
        let (times, rest) = rest
            .split_once(char::is_whitespace)
            .ok_or("repeat N STEP")?;
        let times: usize = number(times)?;
        let step = parse(rest.trim())?;
        return Ok(std::iter::repeat_n(step, times).flatten().collect());
    }
    let args: Vec<&str> = rest.split_whitespace().collect();
    let at = |index: usize| number::<u16>(args.get(index).copied().unwrap_or_default());
    let exactly = |count: usize| {
        if args.len() == count {
            Ok(())
        } else {
            Err(format!(
                "{word} takes {count} words, here are {}",
                args.len()
            ))
        }
    };
    let step = match word {
        "say" => Step::Say(rest.to_owned()),
        "move" => {
            exactly(2)?;
            Step::Move(at(0)?, at(1)?)
        }
        "click" | "rightclick" => {
            exactly(2)?;
            let button = if word == "click" {
                Button::Left
            } else {
                Button::Right
            };
            Step::Click(at(0)?, at(1)?, button)
        }
        "doubleclick" => {
            exactly(2)?;
            Step::DoubleClick(at(0)?, at(1)?)
        }
        "drag" => {
            exactly(4)?;
            Step::Drag((at(0)?, at(1)?), (at(2)?, at(3)?))
        }
        "wheel" => {
            exactly(4)?;
            let turn = match args[2] {
                "up" => Button::WheelUp,
                "down" => Button::WheelDown,
                other => return Err(format!("the wheel turns up or down, not {other:?}")),
            };
            Step::Wheel {
                x: at(0)?,
                y: at(1)?,
                turn,
                clicks: number(args[3])?,
            }
        }
        "type" => Step::Type(quoted(rest)?),
        "key" => Step::Key(Chord::parse(rest).ok_or_else(|| format!("there is no key {rest:?}"))?),
        "think" => {
            exactly(1)?;
            Step::Think(time(args[0])?)
        }
        "since" => {
            exactly(1)?;
            Step::Since(time(args[0])?)
        }
        "quiet" => {
            let (region, rest) = region(&args, 2)?;
            Step::Quiet {
                region,
                quiet: time(rest[0])?,
                limit: time(rest[1])?,
            }
        }
        "changed" => {
            let (region, rest) = region(&args, 1)?;
            Step::Changed {
                region,
                limit: time(rest[0])?,
            }
        }
        "learn" => {
            exactly(5)?;
            let (region, _) = region(args.get(1..).unwrap_or_default(), 0)?;
            Step::Learn(args[0].to_owned(), region.ok_or("a region is X Y W H")?)
        }
        "shows" => {
            exactly(4)?;
            Step::Shows {
                name: args[0].to_owned(),
                x: at(1)?,
                y: at(2)?,
                limit: time(args[3])?,
            }
        }
        "look" => {
            exactly(1)?;
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
            if !args[0].chars().all(plain) {
                return Err(format!("{:?} is no plain name", args[0]));
            }
            Step::Look(args[0].to_owned())
        }
        other => return Err(format!("there is no step {other:?}")),
    };
    Ok(vec![step])
}

/// An optional region, then `times` words.
fn region<'a>(
    args: &'a [&'a str],
    times: usize,
) -> Result<(Option<Region>, &'a [&'a str]), String> {
    if args.len() == times {
        return Ok((None, args));
    }
    if args.len() != times + 4 {
        return Err(format!("a region is X Y W H, followed by {times} times"));
    }
    let (place, rest) = args.split_at(4);
    Ok((
        Some(Region {
            x: number(place[0])?,
            y: number(place[1])?,
            width: number(place[2])?,
            height: number(place[3])?,
        }),
        rest,
    ))
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no number that fits"))
}

fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time such as 2s or 500ms");
    let (digits, scale) = match text.strip_suffix("ms") {
        Some(digits) => (digits, 1e-3),
        None => (text.strip_suffix('s').ok_or_else(wrong)?, 1.0),
    };
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())
}

fn quoted(text: &str) -> Result<String, String> {
    let inside = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .ok_or("text stands in double quotes")?;
    let mut plain = String::new();
    let mut chars = inside.chars();
    while let Some(c) = chars.next() {
        let c = match c {
            '\\' => match chars.next() {
                Some('n') => '\n',
                Some('t') => '\t',
                Some(c @ ('\\' | '"')) => c,
                _ => return Err("after a backslash comes n, t, a quote or a backslash".into()),
            },
            c => c,
        };
        if Chord::of_char(c).is_none() {
            return Err(format!("a US keyboard has no key for {c:?}"));
        }
        plain.push(c);
    }
    Ok(plain)
}

impl Session {
    /// Plays it. `told` hears what the user is about to do; `looks` is the folder for
    /// screenshots, if any are wanted.
    pub async fn play(
        &self,
        robot: &mut Robot,
        looks: Option<&Path>,
        mut told: impl FnMut(Duration, &str),
    ) -> Result<Played, RobotError> {
        robot.set_user(self.user);
        let begun = Instant::now();
        let mut acted = begun;
        let mut played = Played::default();
        let mut learned = BTreeMap::new();
        for (line, step) in &self.steps {
            let waited = match step {
                Step::Since(time) => {
                    tokio::time::sleep(time.saturating_sub(acted.elapsed())).await;
                    Waited::Happened
                }
                Step::Think(time) => {
                    tokio::time::sleep(self.user.think(*time)).await;
                    Waited::Happened
                }
                Step::Say(text) => {
                    told(begun.elapsed(), text);
                    Waited::Happened
                }
                Step::Look(name) => {
                    if let Some(path) = looks.map(|dir| dir.join(name).with_extension("png")) {
                        save(robot, &path);
                    }
                    Waited::Happened
                }
                Step::Learn(name, region) => {
                    learned.insert(name, robot.cut_out(*region));
                    Waited::Happened
                }
                Step::Shows { name, x, y, limit } => match learned.get(name) {
                    Some(picture) => robot.wait_shows(picture, (*x, *y), *limit).await?,
                    // A session in which it isn't learned before is not read.
                    None => Waited::Limit,
                },
                step => act(robot, step).await?,
            };
            if step.is_action() {
                acted = Instant::now();
            }
            if waited == Waited::Limit {
                played.limits.push(*line);
            }
        }
        played.time = begun.elapsed();
        Ok(played)
    }
}

/// A picture for those who watch is not worth ending a session for.
fn save(robot: &Robot, path: &Path) {
    if let Err(error) = robot.save(path) {
        eprintln!("cannot write {}: {error}", path.display());
    }
}

async fn act(robot: &mut Robot, step: &Step) -> Result<Waited, RobotError> {
    match step {
        // Their caller sees to these.
        Step::Say(_)
        | Step::Look(_)
        | Step::Think(_)
        | Step::Since(_)
        | Step::Learn(..)
        | Step::Shows { .. } => {}
        Step::Move(x, y) => robot.move_to(*x, *y).await?,
        Step::Click(x, y, button) => robot.click(*x, *y, *button).await?,
        Step::DoubleClick(x, y) => robot.double_click(*x, *y).await?,
        Step::Drag(from, to) => robot.drag(*from, *to).await?,
        Step::Wheel { x, y, turn, clicks } => robot.wheel(*x, *y, *turn, *clicks).await?,
        Step::Type(text) => robot.type_text(text).await?,
        Step::Key(chord) => robot.key(chord).await?,
        Step::Quiet {
            region,
            quiet,
            limit,
        } => {
            return robot.wait_quiet(*region, *quiet, *limit).await;
        }
        Step::Changed { region, limit } => return robot.wait_changed(*region, *limit).await,
    }
    Ok(Waited::Happened)
}
