//! The broker and the client programs as processes, and waiting for what they print.
//!
//! Nothing here waits for time to pass: a test waits for a line or for the end of a process.

pub(crate) mod broker;
pub(crate) mod certificates;
#[path = "../../support/lines.rs"]
pub(crate) mod lines;
pub(crate) mod mosquitto;
pub(crate) mod node;
pub(crate) mod page;

pub(crate) mod program;
pub(crate) mod python;

use std::path::{Path, PathBuf};

/// A file of these tests, by its path below `tests/interop`.
pub(crate) fn source_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/interop")
        .join(path)
}

/// Something that `./test` installed, by its path below `target/test-tools`.
#[track_caller]
pub(crate) fn test_tool(path: &str) -> PathBuf {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/test-tools")
        .join(path);
    assert!(
        tool.exists(),
        "{} is missing: run ./test once, it installs what the tests need",
        tool.display()
    );
    tool
}

/// The version of the protocol that a client speaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Version {
    V31,
    V311,
    V5,
}

impl Version {
    /// The Protocol Level in CONNECT, which is also MQTT.js's and paho's name for the version.
    pub(crate) fn level(self) -> &'static str {
        match self {
            Self::V31 => "3",
            Self::V311 => "4",
            Self::V5 => "5",
        }
    }
}

/// Makes three tests, one for each protocol version, of each function named.
macro_rules! test_each_version {
    ($($test:ident),+ $(,)?) => {
        $(
            mod $test {
                use crate::support::Version;

                #[test]
                fn v31() {
                    super::$test(Version::V31);
                }

                #[test]
                fn v311() {
                    super::$test(Version::V311);
                }

                #[test]
                fn v5() {
                    super::$test(Version::V5);
                }
            }
        )+
    };
}
pub(crate) use test_each_version;
