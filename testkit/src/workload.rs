//! Programs that a guest is kept busy with, typed into its terminal as a person would: what
//! migrating a VM that runs on is measured with.
//!
//! They are C for the desktop's own `tcc`, so that nothing has to be put into its disk.

use std::time::Duration;

use crate::robot::{Button, Region, Robot, RobotError};

/// Inside the terminal.
const TERMINAL: (u16, u16) = (300, 100);
/// The terminal's text.
const TEXT: Region = Region {
    x: 20,
    y: 40,
    width: 486,
    height: 316,
};
/// An emulated guest on a busy machine needs long for its first program.
const LIMIT: Duration = Duration::from_secs(120);

/// What the guest does all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Counts in words of pages, one page after the other, and begins anew at the first one.
    Writer {
        /// How many pages it goes through; they are filled with numbers of no pattern first.
        pages: u32,
        /// Pages written in a second.
        per_second: u32,
        /// Words counted up in each page, 64 bytes apart: 64 at most.
        words: u32,
    },
    /// Shows moving colours in the terminal, some times a second.
    Video {
        /// Pictures in a second, if the guest is quick enough.
        per_second: u32,
    },
}

impl Workload {
    /// Its source text.
    fn source(self) -> String {
        match self {
            Self::Writer {
                pages,
                per_second,
                words,
            } => {
                // Some pages, then a hundredth of a second's rest.
                let burst = (per_second / 100).max(1);
                format!(
                    "void*malloc();long*m,i,j;main(){{m=malloc({pages}<<12);\
                     for(;i<{pages}<<9;i++)m[i]=rand();puts(\"writes\");fflush(0);\
                     for(i=0;;){{for(j=0;j<{words};j++)m[i%{pages}*512+j*8]++;\
                     if(++i%{burst}==0)usleep(10000);}}}}"
                )
            }
            Self::Video { per_second } => {
                let rest = 1_000_000 / per_second.max(1);
                format!(
                    "int x,y,t;main(){{for(;;t++){{printf(\"\\33[H\");\
                     for(y=0;y<22;y++)for(x=0;x<79;x++)\
                     printf(\"\\33[48;5;%dm \",16+(x*x/9+y*y*2+t*9)/8%216);\
                     fflush(0);usleep({rest});}}}}"
                )
            }
        }
    }

    /// Types it into the terminal and starts it; returns when it shows that it runs.
    pub async fn start(self, robot: &mut Robot) -> Result<(), RobotError> {
        let (x, y) = TERMINAL;
        robot.click(x, y, Button::Left).await?;
        robot
            .wait_quiet(Some(TEXT), Duration::from_secs(1), LIMIT)
            .await?;
        let typed = format!("clear; printf %s '{}' >w.c\n", self.source());
        robot.type_text(&typed).await?;
        robot
            .wait_quiet(Some(TEXT), Duration::from_secs(1), LIMIT)
            .await?;
        robot.type_text("clear; tcc -run w.c 2>w.log\n").await?;
        match self {
            // Silence, while it is compiled; its word; silence.
            Self::Writer { .. } => {
                robot
                    .wait_quiet(Some(TEXT), Duration::from_secs(5), LIMIT)
                    .await?;
            }
            Self::Video { .. } => {
                robot.wait_changed(Some(TEXT), LIMIT).await?;
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
        }
        robot.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_can_be_typed() {
        let writer = Workload::Writer {
            pages: 8192,
            per_second: 4000,
            words: 64,
        };
        for workload in [writer, Workload::Video { per_second: 5 }] {
            let source = workload.source();
            assert!(!source.contains(['\'', '\n']), "{source}");
            let typed = |c: char| crate::robot::keys::Chord::of_char(c).is_some();
            assert!(source.chars().all(typed), "{source}");
            assert_eq!(source.matches('{').count(), source.matches('}').count());
        }
    }
}
