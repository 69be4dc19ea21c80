//! Where packages come from: the mirrors that this host itself trusts, if it runs the guest's release of Debian; else
//! Debian's own default. What apt was told about the network here (proxies, certificates) holds for the guest too.
//!
//! Sources: sources.list(5), both formats; apt-config(8).

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recipe::SUITE;

/// Signs Debian's archives.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Names another mirror: one URL, which must hold the guest's release.
const MIRROR_VARIABLE: &str = "REPLAY_MIGRATE_MIRROR";
const ARCHIVE: &str = "http://deb.debian.org/debian";
const SECURITY_ARCHIVE: &str = "http://deb.debian.org/debian-security";

/// An ordered list of archives.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sources {
    lines: Vec<String>,
}

impl Sources {
    /// As the environment and this host's `/etc/apt` say.
    pub(crate) fn of_this_host() -> Self {
        if let Some(mirror) = std::env::var(MIRROR_VARIABLE)
            .ok()
            .filter(|mirror| !mirror.is_empty())
        {
            return Self::from_mirror(&mirror);
        }
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
            let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            more.sort();
            files.extend(more);
        }
        let mut lines = Vec::new();
        for file in files {
            // Unreadable sources are apt's to complain about; here they only mean that the default is used.
            if let Ok(text) = std::fs::read_to_string(&file) {
                lines.extend(usable(&file, &text));
            }
        }
        if lines
            .iter()
            .any(|line| line.split(' ').nth(3) == Some(SUITE))
        {
            Self { lines }
        } else {
            Self::default()
        }
    }

    /// One mirror, nothing else.
    pub(crate) fn from_mirror(url: &str) -> Self {
        Self {
            lines: vec![line(url, SUITE)],
        }
    }

    /// In sources.list(5)'s one-line format.
    pub(crate) fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl Default for Sources {
    fn default() -> Self {
        let [release, updates, security] = suites();
        Self {
            lines: vec![
                line(ARCHIVE, &release),
                line(ARCHIVE, &updates),
                line(SECURITY_ARCHIVE, &security),
            ],
        }
    }
}

fn suites() -> [String; 3] {
    [
        SUITE.into(),
        format!("{SUITE}-updates"),
        format!("{SUITE}-security"),
    ]
}

fn line(url: &str, suite: &str) -> String {
    format!("deb [signed-by={KEYRING}] {url} {suite} main")
}

/// An entry of either format.
#[derive(Default)]
struct Entry<'a> {
    kinds: Vec<&'a str>,
    urls: Vec<&'a str>,
    suites: Vec<&'a str>,
    components: Vec<&'a str>,
    signed_by: Option<&'a str>,
    disabled: bool,
}

impl Entry<'_> {
    /// Debian's own archives of the guest's release. Others that use its name have keys of their own.
    fn usable(&self) -> Vec<String> {
        let debians = self
            .signed_by
            .is_none_or(|key| key.contains("debian-archive"));
        if self.disabled
            || !debians
            || !self.kinds.contains(&"deb")
            || !self.components.contains(&"main")
        {
            return Vec::new();
        }
        let mut lines = Vec::new();
        for url in self
            .urls
            .iter()
            .filter(|url| url.starts_with("http://") || url.starts_with("https://"))
        {
            for suite in suites()
                .iter()
                .filter(|suite| self.suites.contains(&suite.as_str()))
            {
                lines.push(line(url, suite));
            }
        }
        lines
    }
}

/// The lines that one file of apt's contributes.
fn usable(file: &Path, text: &str) -> Vec<String> {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("list") => text
            .lines()
            .filter_map(one_line)
            .flat_map(|entry| entry.usable())
            .collect(),
        Some("sources") => stanzas(text).iter().flat_map(Entry::usable).collect(),
        _ => Vec::new(),
    }
}

/// `deb [option=value ...] URL SUITE COMPONENT...`
fn one_line(text: &str) -> Option<Entry<'_>> {
    let text = text.split('#').next()?.trim();
    let (kind, mut rest) = text.split_once(char::is_whitespace)?;
    rest = rest.trim_start();
    let mut signed_by = None;
    if let Some(after) = rest.strip_prefix('[') {
        let (options, after) = after.split_once(']')?;
        signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="));
        rest = after;
    }
    let mut words = rest.split_whitespace();
    Some(Entry {
        kinds: vec![kind],
        urls: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
        disabled: false,
    })
}

/// `Types: deb`, `URIs: ...`; an empty line ends an entry. Only embedded keys span lines, and those aren't Debian's.
fn stanzas(text: &str) -> Vec<Entry<'_>> {
    let mut entries = vec![Entry::default()];
    for line in text.lines() {
        if line.trim().is_empty() {
            entries.push(Entry::default());
            continue;
        }
        let (Some((field, value)), Some(entry)) = (line.split_once(':'), entries.last_mut()) else {
            continue;
        };
        let value = value.trim();
        let words = || value.split_whitespace().collect();
        match field.to_ascii_lowercase().as_str() {
            "types" => entry.kinds = words(),
            "uris" => entry.urls = words(),
            "suites" => entry.suites = words(),
            "components" => entry.components = words(),
            "signed-by" => entry.signed_by = Some(value),
            "enabled" => entry.disabled = value == "no",
            _ => {}
        }
    }
    entries
}

/// Settings of this host's apt that decide whether its mirrors can be reached and are believed.
pub(crate) fn apt_options() -> Vec<String> {
    let mut options = vec!["Acquire::Retries \"3\";".to_owned()];
    // Without apt-config there is no apt and nothing was set.
    if let Ok(output) = Command::new("apt-config")
        .args(["dump", "Acquire"])
        .output()
    {
        options.extend(
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .filter(|line| matters(line))
                .map(str::to_owned),
        );
    }
    options
}

fn matters(option: &str) -> bool {
    const PREFIXES: [&str; 6] = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
        "Acquire::ForceIPv4 ",
        "Acquire::ForceIPv6 ",
    ];
    PREFIXES.iter().any(|prefix| option.starts_with(prefix)) && !option.ends_with("\"\";")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &str, text: &str) -> Vec<String> {
        usable(Path::new(file), text)
    }

    #[test]
    fn both_formats_give_the_same() {
        let list = "# mine\ndeb http://mirror.example/debian bookworm main contrib\n\
                    deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                    https://mirror.example/security bookworm-security main # late\n";
        let sources = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-backports\n\
                       Components: main\n\nTypes: deb\nURIs: https://mirror.example/security\n\
                       Suites: bookworm-security\nComponents: main\n\
                       Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";
        let expected = vec![
            line("http://mirror.example/debian", "bookworm"),
            line("https://mirror.example/security", "bookworm-security"),
        ];
        assert_eq!(of("a.list", list), expected);
        assert_eq!(of("a.sources", sources), expected);
    }

    #[test]
    fn other_peoples_archives_are_left_out() {
        for text in [
            "deb-src http://mirror.example/debian bookworm main",
            "deb http://mirror.example/debian trixie main",
            "deb http://shop.example/debian bookworm stable",
            "deb [signed-by=/etc/apt/keyrings/shop.gpg] http://shop.example/debian bookworm main",
            "deb cdrom:[Debian]/ bookworm main",
            "deb",
            "deb [never closed http://x bookworm main",
        ] {
            assert_eq!(of("a.list", text), Vec::<String>::new(), "{text}");
        }
        let disabled = "Enabled: no\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n";
        assert_eq!(of("a.sources", disabled), Vec::<String>::new());
        assert_eq!(
            of(
                "a.list.save",
                "deb http://mirror.example/debian bookworm main"
            ),
            Vec::<String>::new()
        );
    }

    #[test]
    fn only_what_concerns_the_network_is_taken_over() {
        assert!(matters(
            "Acquire::http::Proxy \"http://cache.example:3142\";"
        ));
        assert!(matters("Acquire::Check-Valid-Until \"false\";"));
        assert!(!matters("Acquire::http::Proxy \"\";"));
        assert!(!matters("Acquire::Languages \"none\";"));
    }
}
