//! The account of a migration: bytes by what they were for, and pages by how they came about.

use crate::exchange::Sent;
use crate::protocol::ImageKind;
use crate::report::{ByteReport, PageReports};
use crate::transport::LineHandle;

/// Adds what sending images took, by what the bytes were for.
pub(super) fn account(bytes: &mut ByteReport, sent: &[Sent]) {
    for image in sent {
        bytes.hashes += image.hashes;
        match image.kind {
            ImageKind::Device => bytes.device += image.payload,
            ImageKind::Disk(_) => bytes.disk += image.payload,
            ImageKind::Ram => bytes.ram += image.payload,
        }
    }
}

/// Adds what crossed a line that is done with.
pub(super) fn finish_traffic(bytes: &mut ByteReport, line: &LineHandle) {
    bytes.sent += line.traffic().sent();
    bytes.received += line.traffic().received();
    bytes.resent += line.resent();
}

/// How the pages of all images came about.
pub(super) fn pages(sent: &[Sent]) -> PageReports {
    let mut reports = PageReports::default();
    for image in sent {
        let report = match image.kind {
            ImageKind::Device => &mut reports.device,
            ImageKind::Disk(_) => &mut reports.disk,
            ImageKind::Ram => &mut reports.ram,
        };
        for (recipe, count) in &image.outcome.pages {
            *report.entry(recipe.clone()).or_default() += count;
        }
    }
    reports
}
