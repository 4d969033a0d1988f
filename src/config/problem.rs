//! What is wrong with the configuration, and where it is written.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::uri::without_passwords;

/// Every problem that was found. Printed one after the other, for a person.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\nerror: "))]
pub struct ConfigError(pub(crate) Vec<Problem>);

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

/// One thing to correct.
#[derive(Debug)]
pub(crate) struct Problem {
    origin: Origin,
    what: String,
    /// The way out.
    hint: Option<String>,
}

/// Who gave a setting its value.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    Default,
    File {
        file: Arc<SourceFile>,
        span: Range<usize>,
    },
    /// The name of the variable.
    Environment(String),
    /// The key of `--set`.
    CommandLine(String),
}

pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

impl Problem {
    pub(super) fn new(origin: Origin, what: impl Into<String>) -> Self {
        Self {
            origin,
            what: what.into(),
            hint: None,
        }
    }

    pub(crate) fn without_place(what: impl Into<String>) -> Self {
        Self::new(Origin::Default, what)
    }

    pub(crate) fn in_file(
        file: &Arc<SourceFile>,
        span: Range<usize>,
        what: impl Into<String>,
    ) -> Self {
        Self::new(
            Origin::File {
                file: Arc::clone(file),
                span,
            },
            what,
        )
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Default => f.write_str(&self.what)?,
            Origin::File { file, span } => {
                f.write_str(&self.what)?;
                file.excerpt(span, f)?;
            }
            origin @ (Origin::Environment(_) | Origin::CommandLine(_)) => {
                write!(f, "{origin}: {}", self.what)?;
            }
        }
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Without the text, which may hold passwords.
impl fmt::Debug for SourceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SourceFile({})", self.path.display())
    }
}

impl SourceFile {
    /// The number of the line, its text, and the number of the column where `offset` is.
    fn locate(&self, offset: usize) -> (usize, &str, usize) {
        let before = self.text.get(..offset).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text[line_start..].lines().next().unwrap_or_default();
        let number = before.matches('\n').count() + 1;
        (number, line, before[line_start..].chars().count() + 1)
    }

    /// The line that `span` begins in, with the span underlined.
    fn excerpt(&self, span: &Range<usize>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, line, column) = self.locate(span.start);
        let marked = self.text.get(span.clone()).unwrap_or_default();
        let width = marked
            .lines()
            .next()
            .map_or(0, |line| line.chars().count())
            .max(1);
        let margin = " ".repeat(number.to_string().len());
        write!(
            f,
            "\n{margin}--> {}:{number}:{column}\n{margin} |\n{number} | {}\n{margin} | {}{}",
            self.path.display(),
            without_passwords(line).replace('\t', " "),
            " ".repeat(column - 1),
            "^".repeat(width),
        )
    }
}

/// Short, as `midge check` shows where a value comes from.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { file, span } => {
                write!(f, "{}:{}", file.path.display(), file.locate(span.start).0)
            }
            Self::Environment(variable) => f.write_str(variable),
            Self::CommandLine(key) => write!(f, "--set {key}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_in_a_file_shows_the_line_and_underlines_the_place() {
        let file = SourceFile {
            path: "m.toml".into(),
            text: "[limits]\n\tfoo = 1\n".to_owned(),
        };
        let problem = Problem::new(
            Origin::File {
                file: Arc::new(file),
                span: 10..13,
            },
            "unknown key",
        )
        .with_hint("take it out");

        assert_eq!(
            problem.to_string(),
            "unknown key\n --> m.toml:2:2\n  |\n2 |  foo = 1\n  |  ^^^\n  hint: take it out"
        );
    }

    #[test]
    fn a_place_behind_the_end_is_no_reason_to_panic() {
        let file = SourceFile {
            path: "m.toml".into(),
            text: String::new(),
        };
        let problem = Problem::new(
            Origin::File {
                file: Arc::new(file),
                span: 7..9,
            },
            "unexpected end",
        );

        assert!(problem.to_string().contains("m.toml:1:1"));
    }
}
