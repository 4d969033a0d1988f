//! Finding the subscriptions of a topic among a million, a tenth of them with wildcards.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use midge::mqtt::topic_tree::TopicTree;

const SUBSCRIPTIONS: u32 = 1_000_000;

fn filter(number: u32) -> String {
    let (site, device) = (number % 1000, number / 1000);
    match number % 20 {
        0 => format!("site/{site}/+/{device}/temperature"),
        1 => format!("site/{site}/line/{device}/#"),
        _ => format!("site/{site}/line/{device}/sensor/{number}"),
    }
}

fn matching(criterion: &mut Criterion) {
    let mut tree = TopicTree::new();
    for number in 0..SUBSCRIPTIONS {
        tree.insert(&filter(number), number, |_| false);
    }
    tree.insert("#", u32::MAX, |_| false);
    let mut group = criterion.benchmark_group("match among 1,000,000");
    for (name, topic) in [
        ("own topic", "site/777/line/500/sensor/500777"),
        ("wildcards", "site/21/line/40/temperature"),
        ("nobody but #", "elsewhere/1/2/3/4"),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut found = 0;
                tree.visit_matches(black_box(topic), |value| found ^= value);
                found
            });
        });
    }
    group.finish();
}

criterion_group!(benches, matching);
criterion_main!(benches);
