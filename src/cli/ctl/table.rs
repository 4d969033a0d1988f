//! Lists as columns of text.

use std::fmt::Write as _;

use serde_json::Value;

/// Columns that keep their width from one page to the next, unless it is too small.
pub(super) struct Table {
    /// Dotted names of what is shown of each item, which are also their headings.
    columns: Vec<(&'static str, usize)>,
    has_heading: bool,
}

impl Table {
    pub(super) fn new(columns: &[&'static str]) -> Self {
        Self {
            columns: columns.iter().map(|name| (*name, name.len())).collect(),
            has_heading: false,
        }
    }

    /// The lines of some items; of the first ones with the heading above.
    pub(super) fn rows(&mut self, items: &[Value]) -> String {
        let cells = |item: &Value, columns: &[(&str, usize)]| -> Vec<String> {
            let cell = |(name, _): &(&str, usize)| {
                let value = name.split('.').fold(item, |value, key| &value[key]);
                super::text(value)
            };
            columns.iter().map(cell).collect()
        };
        let mut rows: Vec<Vec<String>> = Vec::new();
        if !std::mem::replace(&mut self.has_heading, true) {
            rows.push(
                self.columns
                    .iter()
                    .map(|(name, _)| name.to_uppercase())
                    .collect(),
            );
        }
        rows.extend(items.iter().map(|item| cells(item, &self.columns)));
        for row in &rows {
            for ((_, width), cell) in self.columns.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut lines = String::new();
        for row in rows {
            let mut line = String::new();
            for ((_, width), cell) in self.columns.iter().zip(row) {
                let _ = write!(line, "{cell:width$}  ");
            }
            let _ = writeln!(lines, "{}", line.trim_end());
        }
        lines
    }
}

/// A text of a client without what would steer a terminal.
pub(super) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            plain.extend(letter.escape_default());
        } else {
            plain.push(letter);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let mut table = Table::new(&["client_id", "queue.messages"]);

        let first = table.rows(&[json!({ "client_id": "a", "queue": { "messages": 7 } })]);
        let second = table.rows(&[json!({ "client_id": "a-long-client", "queue": null })]);

        assert_eq!(first, "CLIENT_ID  QUEUE.MESSAGES\na          7\n");
        assert_eq!(second, "a-long-client  -\n");
    }

    #[test]
    fn a_client_id_cannot_steer_the_terminal() {
        assert_eq!(plain("a\u{1b}[2Jü\n"), "a\\u{1b}[2Jü\\n");
    }
}
