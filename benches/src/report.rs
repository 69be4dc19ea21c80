//! What is measured.

use std::fmt;

use reconciler::{Codec, Effort, PageCounts, PageDelta, Stats};
use serde::Serialize;

use crate::deltas::DeltaRow;
use crate::diverged::Diverged;
use crate::kinds::KindRow;
use crate::pace::{Pace, Yardsticks, rate_name};

/// A way of moving a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Against nothing.
    Full,
    /// Against the stale copy.
    Base,
    /// Against what a replay made of the stale copy.
    Replay,
    /// The same, told by the source's own replay.
    Twin,
}

impl Strategy {
    /// All, the dearest first.
    pub const ALL: [Self; 4] = [Self::Full, Self::Base, Self::Replay, Self::Twin];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Base => "base",
            Self::Replay => "replay",
            Self::Twin => "twin",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Reconciling one image one way.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which way.
    pub strategy: Strategy,
    /// As [`name_of`] writes it.
    pub codec: String,
    /// `device`, `disk` (`disk1` and so on for more) or `ram`.
    pub image: String,
    /// What crosses the line.
    pub bytes: Bytes,
    /// Pages by recipe.
    pub pages: PageCounts,
    /// What it took.
    pub seconds: Seconds,
    /// By how much the memory of this process grew at most, in bytes: both ends together, and
    /// the compressed pages of a round. Mapped files do not count. `None` where the system
    /// does not tell.
    pub peak_memory: Option<u64>,
    /// Where it was measured over a line: how fast that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
}

impl Row {
    /// Counts what saying how the image lies took.
    pub(crate) fn add_layout(&mut self, bytes: u64, seconds: &Seconds) {
        self.bytes.layout += bytes;
        self.bytes.total += bytes;
        self.seconds.layout = seconds.layout;
        self.seconds.realign = seconds.realign;
    }
}

/// Bytes by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// All.
    pub total: u64,
    /// Which pages differ, their hashes, and the answer.
    pub hashes: u64,
    /// How the source's processes lie in RAM, and in which order its device state is.
    pub layout: u64,
    /// Asking for pages whose patch did not fit.
    pub retries: u64,
    /// Pages in whole.
    pub literals: u64,
    /// Pages as what differs from the base.
    pub deltas: u64,
    /// Pages as words over a replayed page.
    pub patches: u64,
    /// Lines over pages whose patch did not fit.
    pub lines: u64,
    /// Which page is told how.
    pub kinds: u64,
    /// Mending what a hash that was too short let pass.
    pub repairs: u64,
}

impl Bytes {
    pub(crate) fn of(stats: &Stats) -> Self {
        let rounds = [&stats.encoded, &stats.resent, &stats.whole];
        let sum = |of: fn(&reconciler::EncodeStats) -> u64| rounds.iter().copied().map(of).sum();
        Self {
            total: stats.bytes(),
            hashes: stats.offer_bytes + stats.answer_bytes,
            layout: 0,
            retries: stats.retry_bytes,
            literals: sum(|round| round.literal_bytes),
            deltas: sum(|round| round.delta_bytes),
            patches: stats.encoded.patch_bytes,
            lines: stats.resent.patch_bytes + stats.whole.patch_bytes,
            kinds: sum(|round| round.kinds_bytes),
            repairs: stats.repair_bytes,
        }
    }
}

/// Seconds by stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// The source's, for `twin` alone: saying how its processes and its device state lie.
    pub layout: f64,
    /// The target's, for `twin` alone: bringing its replay into that layout.
    pub realign: f64,
    /// The source's: what differs.
    pub offer: f64,
    /// The target's: what of it is here.
    pub resolve: f64,
    /// The source's: reading, comparing, compressing.
    pub encode: f64,
    /// The target's: unpacking, writing.
    pub decode: f64,
    /// The target's: hashing what came out.
    pub verify: f64,
}

/// Everything that was measured on a capture.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// One for each strategy, codec and image.
    pub rows: Vec<Row>,
    /// What the machine does by itself, if anything was measured over a line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub yardsticks: Option<Yardsticks>,
    /// One for each delta codec that was asked for and image.
    pub deltas: Vec<DeltaRow>,
    /// How many free pages of the source counted as zero, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_dropped: Option<u64>,
    /// How far the target's replay is from the source's state, if there is one.
    pub diverged: Option<Diverged>,
    /// What each kind of RAM page takes with a base, the last for all together; empty where the
    /// guest is no Linux that is understood.
    pub kinds: Vec<KindRow>,
}

impl Row {
    /// The heads of [`Row::line`]'s columns.
    pub fn heads() -> String {
        format!(
            "{:8} {:11} {:7} {:>12} {:>9} {:>9} {:>11} {:>10} {:>10} {:>9} {:>8} {:>8} {:>8}",
            "strategy",
            "codec",
            "image",
            "bytes",
            "hashes",
            "layout",
            "literals",
            "deltas",
            "patches",
            "lines",
            "encode s",
            "decode s",
            "peak MiB"
        )
    }

    /// For a table in a terminal.
    pub fn line(&self) -> String {
        let (bytes, seconds) = (&self.bytes, &self.seconds);
        let encode = seconds.layout + seconds.offer + seconds.encode;
        let decode = seconds.realign + seconds.resolve + seconds.decode + seconds.verify;
        let memory = self
            .peak_memory
            .map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
        format!(
            "{:8} {:11} {:7} {:>12} {:>9} {:>9} {:>11} {:>10} {:>10} {:>9} {encode:>8.2} \
             {decode:>8.2} {memory:>8}",
            self.strategy,
            self.codec,
            self.image,
            bytes.total,
            bytes.hashes + bytes.repairs,
            bytes.layout,
            bytes.literals + bytes.kinds,
            bytes.deltas,
            bytes.patches,
            bytes.lines + bytes.retries,
        )
    }
}

impl Row {
    /// The heads of [`Row::pace_line`]'s columns: seconds but where it says otherwise.
    pub fn pace_heads() -> String {
        format!(
            "{:8} {:8} {:7} {:18} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9} {:>8}",
            "strategy",
            "line",
            "image",
            "codec",
            "scan",
            "offer",
            "resolve",
            "encode",
            "line s",
            "decode",
            "pages",
            "verify",
            "total",
            "cpu",
            "scan MB/s",
            "chg. MB/s",
            "peak MiB"
        )
    }

    /// For a table in a terminal, if it was measured over a line.
    pub fn pace_line(&self) -> Option<String> {
        let (pace, seconds) = (self.pace.as_ref()?, &self.seconds);
        let memory = self
            .peak_memory
            .map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
        Some(format!(
            "{:8} {:8} {:7} {:18} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} \
             {:>9.0} {:>9.0} {memory:>8}",
            self.strategy,
            rate_name(pace.bits_per_second),
            self.image,
            pace.codecs.join(","),
            pace.scan,
            seconds.offer,
            seconds.resolve,
            seconds.encode,
            pace.line,
            seconds.decode,
            pace.pages,
            seconds.verify,
            pace.total,
            pace.processor,
            pace.scanned_per_second() / 1e6,
            pace.changed_per_second() / 1e6,
        ))
    }
}

/// A codec as it is written on a command line: `zstd:3`, `lzma:fast`.
pub fn name_of(codec: Codec) -> String {
    match codec {
        Codec::Zstd(level) => format!("zstd:{level}"),
        Codec::Lzma(effort) => format!("lzma:{}", effort_name(effort)),
    }
}

/// Something that can be asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// A codec of the page streams.
    Stream(Codec),
    /// A delta codec of the papers.
    Delta(PageDelta),
}

/// What is measured unless something is asked for.
pub fn usual_codecs() -> Vec<Named> {
    let streams = [Codec::Zstd(3), Codec::Lzma(Effort::Fast)].map(Named::Stream);
    streams
        .into_iter()
        .chain(PageDelta::ALL.map(Named::Delta))
        .collect()
}

/// Reads the name of a codec of either kind.
///
/// # Errors
/// Says what would have been one.
pub fn named(name: &str) -> Result<Named, String> {
    let delta = PageDelta::ALL
        .into_iter()
        .find(|delta| delta.name() == name);
    match delta {
        Some(delta) => Ok(Named::Delta(delta)),
        None => codec_of(name).map(Named::Stream).map_err(|why| {
            let deltas = PageDelta::ALL.map(PageDelta::name).join(", ");
            format!("{why}, or a delta codec: {deltas}")
        }),
    }
}

const fn effort_name(effort: Effort) -> &'static str {
    match effort {
        Effort::Fast => "fast",
        Effort::Normal => "normal",
        Effort::Strong => "strong",
    }
}

/// Reads what [`name_of`] writes.
///
/// # Errors
/// Says what would have been a codec.
pub fn codec_of(name: &str) -> Result<Codec, String> {
    let level = |name: &str| name.strip_prefix("zstd:")?.parse().ok();
    let known = |level: &i32| *level != 0 && (-50..=19).contains(level);
    if let Some(level) = level(name).filter(known) {
        return Ok(Codec::Zstd(level));
    }
    [Effort::Fast, Effort::Normal, Effort::Strong]
        .into_iter()
        .map(Codec::Lzma)
        .find(|codec| name_of(*codec) == name)
        .ok_or_else(|| {
            format!(
                "{name:?} is no codec; use zstd:1 to zstd:19, zstd:-1 and below for speed, lzma:fast, lzma:normal or lzma:strong"
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_have_names() {
        for name in [
            "zstd:1",
            "zstd:19",
            "lzma:fast",
            "lzma:normal",
            "lzma:strong",
        ] {
            assert_eq!(name_of(codec_of(name).unwrap()), name);
        }
        assert_eq!(named("xbrle"), Ok(Named::Delta(PageDelta::Xbrle)));
        assert_eq!(named("zstd:-5"), Ok(Named::Stream(Codec::Zstd(-5))));
        assert!(named("xbz").unwrap_err().contains("changed-bytes"));
        for name in [
            "", "zstd", "zstd:0", "zstd:20", "zstd:x", "lzma", "lzma:9", "xz",
        ] {
            assert!(codec_of(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_line_has_its_heads() {
        let row = Row {
            strategy: Strategy::Twin,
            codec: "lzma:strong".to_owned(),
            image: "device".to_owned(),
            bytes: Bytes::default(),
            pages: PageCounts::default(),
            seconds: Seconds::default(),
            peak_memory: Some(5 << 20),
            pace: None,
        };
        assert_eq!(row.line().len(), Row::heads().len());
    }
}
