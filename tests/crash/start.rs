//! Data directories that cannot be used.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::broker::{Broker, command};

/// Runs midge, which must not start; returns what it says.
fn refusal(data: &Path) -> String {
    let output = command(data, &[]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let is_logged = |line: &&str| line.starts_with('{');
    let lines = said.lines().skip_while(is_logged).count();
    assert_eq!(lines, 1, "it says it in one line: {said}");
    assert!(
        said.contains(data.to_str().unwrap()),
        "it names the directory: {said}"
    );
    said
}

#[test]
fn a_second_midge_on_the_same_data_is_refused() {
    let broker = Broker::start();

    let said = refusal(broker.data());

    assert!(said.contains("in use by another midge"), "{said}");
}

#[test]
fn a_data_directory_that_is_a_file_is_refused() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();

    assert!(refusal(&file).contains("not a directory"));
    refusal(&file.join("below"));
}

#[test]
fn a_data_directory_that_cannot_be_written_to_is_refused() {
    // Not even root may make directories there.
    refusal(Path::new("/proc/midge"));
}
