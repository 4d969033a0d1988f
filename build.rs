//! Tells the broker what it is made of, for `/metrics` and `/api/v1/version`.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=BUILD_REVISION");
    let rustc = std::env::var("RUSTC").unwrap_or_default();
    let rust_version = first_line(Command::new(rustc).arg("--version"));
    // rustc 1.95.0 (59807616e 2026-04-14)
    let rust_version = rust_version.and_then(|line| Some(line.split(' ').nth(1)?.to_owned()));
    let revision = std::env::var("BUILD_REVISION").ok().or_else(checked_out);
    for (name, value) in [
        ("BUILD_RUST_VERSION", rust_version),
        ("BUILD_REVISION", revision),
    ] {
        let value = value.unwrap_or_else(|| "unknown".to_owned());
        println!("cargo::rustc-env={name}={value}");
    }
}

/// What this is a check-out of. Builds without optimisation do not say, or each commit would have them
/// all made anew.
fn checked_out() -> Option<String> {
    let moves = Path::new(".git/logs/HEAD");
    if std::env::var("PROFILE").as_deref() != Ok("release") || !moves.exists() {
        return None;
    }
    println!("cargo::rerun-if-changed={}", moves.display());
    first_line(Command::new("git").args(["rev-parse", "HEAD"]))
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(str::to_owned)
}
