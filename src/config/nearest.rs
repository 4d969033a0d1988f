//! "Did you mean …?"

/// The candidate that `wanted` is most likely a misspelling of, if any is close enough.
///
/// Both are dotted keys. Words in another order count as the same: `limits.max_connections` is
/// how others call `limits.connections_max`.
pub(super) fn nearest(
    wanted: &str,
    candidates: impl IntoIterator<Item = String>,
) -> Option<String> {
    let sorted_wanted = sort_words(wanted);
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let sorted = sort_words(&candidate);
            let edits = distance(wanted, &candidate).min(distance(&sorted_wanted, &sorted));
            let close = edits <= (last_part(&candidate).len() / 3).max(2);
            let shared = shared_words(last_part(wanted), last_part(&candidate));
            (close || shared >= 2).then_some(((!close, edits), candidate))
        })
        .min()
        .map(|(_, candidate)| candidate)
}

fn last_part(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

fn words(text: &str) -> Vec<&str> {
    text.split(['_', '.']).collect()
}

fn sort_words(key: &str) -> String {
    let mut words = words(key);
    words.sort_unstable();
    words.join("_")
}

fn shared_words(left: &str, right: &str) -> usize {
    let right = words(right);
    words(left)
        .iter()
        .filter(|word| right.contains(word))
        .count()
}

/// Insertions, deletions and replacements that turn one into the other.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (above, left) in left.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], above + 1);
        for (column, right) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(left != *right);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }

    #[test]
    fn a_misspelling_finds_its_key() {
        let keys = [
            "limits.connections_max",
            "limits.connect_timeout",
            "limits.packet_bytes_max",
            "sys.interval",
        ];
        for (wanted, found) in [
            ("limits.packet_byte_max", Some("limits.packet_bytes_max")),
            ("limits.max_connections", Some("limits.connections_max")),
            ("max_connections", Some("limits.connections_max")),
            ("limits.max_packet_size", Some("limits.packet_bytes_max")),
            ("sys.intervall", Some("sys.interval")),
            ("limits.colour", None),
        ] {
            assert_eq!(
                nearest(wanted, keys.map(str::to_owned)).as_deref(),
                found,
                "{wanted}"
            );
        }
    }
}
