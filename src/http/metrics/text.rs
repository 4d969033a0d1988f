//! The two formats that Prometheus reads: its own text format, version 0.0.4, and OpenMetrics 1.0.

use std::fmt::{Display, Write as _};

use super::families::{Family, Kind};
use crate::metrics::Distribution;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    OpenMetrics,
}

impl Format {
    /// What a client wants that sends this in `Accept`. OpenMetrics only if it is named.
    pub(super) fn accepted_by(accept: &str) -> Self {
        match accept.contains("application/openmetrics-text") {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// An answer that is being written, family by family.
#[derive(Debug)]
pub(super) struct Exposition {
    format: Format,
    text: String,
}

/// The samples of one family.
#[derive(Debug)]
pub(super) struct Samples<'a> {
    family: &'static Family,
    text: &'a mut String,
}

impl Exposition {
    pub(super) fn new(format: Format) -> Self {
        Self {
            format,
            text: String::new(),
        }
    }

    pub(super) fn family(&mut self, family: &'static Family) -> Samples<'_> {
        let name = match (self.format, family.kind) {
            // There the suffix belongs to the sample.
            (Format::OpenMetrics, Kind::Counter) => family.name.trim_end_matches("_total"),
            _ => family.name,
        };
        let kind = family.kind.name();
        let text = &mut self.text;
        // Nothing that has to be escaped is in our own words.
        let _ = write!(
            text,
            "# HELP {name} {}\n# TYPE {name} {kind}\n",
            family.help
        );
        Samples { family, text }
    }

    /// A family with one sample that has no labels.
    pub(super) fn value(&mut self, family: &'static Family, value: impl Display) {
        self.family(family).sample(&[], value);
    }

    pub(super) fn finish(mut self) -> String {
        if self.format == Format::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

impl Samples<'_> {
    /// `labels` are the values of the family's labels, in their order.
    pub(super) fn sample(&mut self, labels: &[&str], value: impl Display) {
        self.line("", labels, None, value);
    }

    pub(super) fn distribution(&mut self, labels: &[&str], seen: &Distribution) {
        let mut count = 0;
        let bounds = seen.bounds.iter().map(|(_, bound)| *bound).chain(["+Inf"]);
        for (bound, bucket) in bounds.zip(&seen.buckets) {
            count += bucket;
            self.line("_bucket", labels, Some(bound), count);
        }
        self.line("_sum", labels, None, seen.sum);
        self.line("_count", labels, None, count);
    }

    fn line(&mut self, suffix: &str, labels: &[&str], bound: Option<&str>, value: impl Display) {
        debug_assert_eq!(labels.len(), self.family.labels.len());
        self.text.push_str(self.family.name);
        self.text.push_str(suffix);
        let names = self.family.labels.iter().copied().chain(["le"]);
        let values = labels.iter().copied().chain(bound);
        let mut separator = '{';
        for (name, value) in names.zip(values) {
            self.text.push(separator);
            self.text.push_str(name);
            self.text.push_str("=\"");
            escape(value, self.text);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        // Writing into a string cannot fail.
        let _ = writeln!(self.text, " {value}");
    }
}

/// The name of a node or a listener is the operator's.
fn escape(value: &str, into: &mut String) {
    for character in value.chars() {
        match character {
            '\\' => into.push_str("\\\\"),
            '"' => into.push_str("\\\""),
            '\n' => into.push_str("\\n"),
            other => into.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Histogram;
    use std::time::Duration;

    static BYTES: Family = Family {
        name: "test_bytes_total",
        kind: Kind::Counter,
        labels: &["listener"],
        help: "Bytes.",
    };
    static TIMES: Family = Family {
        name: "test_duration_seconds",
        kind: Kind::Histogram,
        labels: &[],
        help: "Durations.",
    };

    #[test]
    fn a_counter_has_its_suffix_where_the_format_wants_it() {
        let write = |format| {
            let mut exposition = Exposition::new(format);
            exposition.family(&BYTES).sample(&["a\"\\\nb"], 7);
            exposition.finish()
        };

        let sample = "test_bytes_total{listener=\"a\\\"\\\\\\nb\"} 7\n";
        assert_eq!(
            write(Format::Text),
            format!("# HELP test_bytes_total Bytes.\n# TYPE test_bytes_total counter\n{sample}")
        );
        assert_eq!(
            write(Format::OpenMetrics),
            format!("# HELP test_bytes Bytes.\n# TYPE test_bytes counter\n{sample}# EOF\n")
        );
    }

    #[test]
    fn the_buckets_of_a_histogram_include_those_before_them() {
        let histogram: Histogram = Histogram::default();
        histogram.observe(Duration::from_micros(50));
        histogram.observe(Duration::from_millis(2));
        histogram.observe(Duration::from_secs(60));
        let mut exposition = Exposition::new(Format::Text);

        let mut samples = exposition.family(&TIMES);
        samples.distribution(&[], &histogram.read());

        let text = exposition.finish();
        let lines: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(lines[0], "test_duration_seconds_bucket{le=\"0.0001\"} 1");
        assert_eq!(lines[4], "test_duration_seconds_bucket{le=\"0.0025\"} 2");
        assert_eq!(
            lines[16..],
            [
                "test_duration_seconds_bucket{le=\"+Inf\"} 3",
                "test_duration_seconds_sum 60.00205",
                "test_duration_seconds_count 3",
            ]
        );
    }

    #[test]
    fn open_metrics_is_for_those_who_ask_for_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3";

        assert_eq!(Format::accepted_by(prometheus), Format::OpenMetrics);
        assert_eq!(Format::accepted_by("*/*"), Format::Text);
    }
}
