//! A tree of Topic Filters: which of a million subscriptions match a Topic Name, section 4.7.

use std::fmt;
use std::hash::BuildHasher;

use compact_str::CompactString;
use hashbrown::{DefaultHashBuilder, HashTable};

/// Values kept under Topic Filters, found by Topic Name.
///
/// A node is the prefix of a filter. Its children are found in one table for the whole tree, keyed
/// by (parent, level), so a node is small and each level of a topic costs one look-up in each
/// branch: its own level, and `+`.
pub struct TopicTree<T> {
    nodes: Vec<Node<T>>,
    /// Places in `nodes` that are not in use.
    free: Vec<u32>,
    /// Every node but the root, by parent and level.
    edges: HashTable<u32>,
    hasher: DefaultHashBuilder,
    length: usize,
}

struct Node<T> {
    parent: u32,
    level: CompactString,
    children: u32,
    /// The child for `+`; the root if there is none, since the root is nobody's child.
    plus: u32,
    /// Under the filter that ends here.
    values: Vec<T>,
    /// Under the filter that ends here with `/#`.
    multi_level: Vec<T>,
}

const ROOT: u32 = 0;

impl<T> Node<T> {
    fn new(parent: u32, level: &str) -> Self {
        Self {
            parent,
            level: level.into(),
            children: 0,
            plus: ROOT,
            values: Vec::new(),
            multi_level: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.children == 0 && self.values.is_empty() && self.multi_level.is_empty()
    }
}

impl<T> TopicTree<T> {
    pub fn new() -> Self {
        Self {
            nodes: vec![Node::new(ROOT, "")],
            free: Vec::new(),
            edges: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            length: 0,
        }
    }

    /// How many values it holds.
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Puts `value` under a valid Topic Filter, in place of one that `replaces` says is the same.
    /// Returns whether there was none.
    pub fn insert(&mut self, filter: &str, value: T, replaces: impl Fn(&T) -> bool) -> bool {
        let (prefix, multi_level) = split_filter(filter);
        let mut node = ROOT;
        for level in prefix {
            node = self
                .child(node, level)
                .unwrap_or_else(|| self.add_child(node, level));
        }
        let node = &mut self.nodes[node as usize];
        let values = if multi_level {
            &mut node.multi_level
        } else {
            &mut node.values
        };
        if let Some(same) = values.iter_mut().find(|known| replaces(known)) {
            *same = value;
            return false;
        }
        // Most filters have one value.
        values.reserve_exact(usize::from(values.is_empty()));
        values.push(value);
        self.length += 1;
        true
    }

    /// Removes the value under `filter` of which `is_it` is true; returns whether there was one.
    pub fn remove(&mut self, filter: &str, is_it: impl Fn(&T) -> bool) -> bool {
        let (prefix, multi_level) = split_filter(filter);
        let mut at = ROOT;
        for level in prefix {
            match self.child(at, level) {
                Some(child) => at = child,
                None => return false,
            }
        }
        let node = &mut self.nodes[at as usize];
        let values = if multi_level {
            &mut node.multi_level
        } else {
            &mut node.values
        };
        let Some(place) = values.iter().position(is_it) else {
            return false;
        };
        values.swap_remove(place);
        self.length -= 1;
        while at != ROOT && self.nodes[at as usize].is_empty() {
            at = self.remove_node(at);
        }
        true
    }

    /// Calls `visit` with each value whose filter matches `topic`. Filters that begin with a
    /// wildcard do not match topics that begin with `$`, [MQTT-4.7.2-1].
    pub fn visit_matches<'a>(&'a self, topic: &str, mut visit: impl FnMut(&'a T)) {
        self.visit_below(ROOT, Some(topic), topic.starts_with('$'), &mut visit);
    }

    /// The filters that have a value of which `is_it` is true, with the value. It looks at all of them.
    pub fn filters_of(&self, is_it: impl Fn(&T) -> bool) -> Vec<(String, &T)> {
        let mut found = Vec::new();
        for (place, node) in self.nodes.iter().enumerate() {
            for (values, suffix) in [(&node.values, None), (&node.multi_level, Some("#"))] {
                for value in values.iter().filter(|value| is_it(value)) {
                    found.push((self.filter_at(place, suffix), value));
                }
            }
        }
        found
    }

    fn filter_at(&self, place: usize, suffix: Option<&str>) -> String {
        let mut levels: Vec<&str> = suffix.into_iter().collect();
        let mut at = place;
        while at != ROOT as usize {
            let node = &self.nodes[at];
            levels.push(&node.level);
            at = node.parent as usize;
        }
        levels.reverse();
        levels.join("/")
    }

    fn visit_below<'a>(
        &'a self,
        node: u32,
        topic: Option<&str>,
        hidden: bool,
        visit: &mut impl FnMut(&'a T),
    ) {
        let here = &self.nodes[node as usize];
        if !hidden {
            here.multi_level.iter().for_each(&mut *visit);
        }
        let Some(topic) = topic else {
            here.values.iter().for_each(visit);
            return;
        };
        if here.children == 0 {
            return;
        }
        let (level, rest) = match topic.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (topic, None),
        };
        if let Some(child) = self.child(node, level) {
            self.visit_below(child, rest, false, visit);
        }
        if here.plus != ROOT && !hidden {
            self.visit_below(here.plus, rest, false, visit);
        }
    }

    fn hash(&self, parent: u32, level: &str) -> u64 {
        self.hasher.hash_one((parent, level))
    }

    fn child(&self, parent: u32, level: &str) -> Option<u32> {
        let is_it = |child: &u32| {
            let node = &self.nodes[*child as usize];
            node.parent == parent && node.level == level
        };
        self.edges.find(self.hash(parent, level), is_it).copied()
    }

    fn add_child(&mut self, parent: u32, level: &str) -> u32 {
        let node = Node::new(parent, level);
        let child = match self.free.pop() {
            Some(place) => {
                self.nodes[place as usize] = node;
                place
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("memory ends before the numbers do")
            }
        };
        let (nodes, hasher) = (&self.nodes, &self.hasher);
        let rehash = |place: &u32| {
            let node = &nodes[*place as usize];
            hasher.hash_one((node.parent, node.level.as_str()))
        };
        self.edges
            .insert_unique(hasher.hash_one((parent, level)), child, rehash);
        let parent = &mut self.nodes[parent as usize];
        parent.children += 1;
        if level == "+" {
            parent.plus = child;
        }
        child
    }

    /// Returns the parent.
    fn remove_node(&mut self, place: u32) -> u32 {
        let node = &self.nodes[place as usize];
        let parent = node.parent;
        let is_plus = node.level == "+";
        let hash = self.hash(parent, &node.level);
        if let Ok(edge) = self.edges.find_entry(hash, |child| *child == place) {
            edge.remove();
        }
        self.nodes[place as usize] = Node::new(ROOT, "");
        self.free.push(place);
        let parent_node = &mut self.nodes[parent as usize];
        parent_node.children -= 1;
        if is_plus {
            parent_node.plus = ROOT;
        }
        parent
    }
}

impl<T> Default for TopicTree<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for TopicTree<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TopicTree")
            .field("values", &self.length)
            .field("nodes", &self.nodes.len())
            .finish()
    }
}

/// The levels of a filter without a final `#`, and whether there is one.
fn split_filter(filter: &str) -> (impl Iterator<Item = &str>, bool) {
    let (prefix, multi_level) = if filter == "#" {
        (None, true)
    } else if let Some(prefix) = filter.strip_suffix("/#") {
        (Some(prefix), true)
    } else {
        (Some(filter), false)
    };
    (
        prefix.into_iter().flat_map(|prefix| prefix.split('/')),
        multi_level,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(tree: &TopicTree<&'static str>, topic: &str) -> Vec<&'static str> {
        let mut found = Vec::new();
        tree.visit_matches(topic, |value| found.push(*value));
        found.sort_unstable();
        found
    }

    fn tree(filters: &[&'static str]) -> TopicTree<&'static str> {
        let mut tree = TopicTree::new();
        for &filter in filters {
            assert!(tree.insert(filter, filter, |known| *known == filter));
        }
        tree
    }

    #[test]
    fn mqtt_4_7_1_wildcards_match_as_the_specification_says() {
        let tree = tree(&[
            "#",
            "sport/#",
            "sport/+",
            "sport",
            "+",
            "+/+",
            "/+",
            "sport/tennis/+",
            "+/tennis/#",
        ]);

        assert_eq!(matches(&tree, "sport"), ["#", "+", "sport", "sport/#"]);
        assert_eq!(matches(&tree, "sport/"), ["#", "+/+", "sport/#", "sport/+"]);
        assert_eq!(matches(&tree, "/finance"), ["#", "+/+", "/+"]);
        assert_eq!(
            matches(&tree, "sport/tennis/player1"),
            ["#", "+/tennis/#", "sport/#", "sport/tennis/+"]
        );
    }

    #[test]
    fn mqtt_4_7_2_1_leading_wildcards_do_not_match_dollar_topics() {
        let tree = tree(&["#", "+/broker/uptime", "$SYS/#", "$SYS/+/uptime"]);

        assert_eq!(
            matches(&tree, "$SYS/broker/uptime"),
            ["$SYS/#", "$SYS/+/uptime"]
        );
        assert_eq!(matches(&tree, "a/broker/uptime"), ["#", "+/broker/uptime"]);
    }

    #[test]
    fn filters_are_given_back_as_they_were_put_in() {
        let filters = ["#", "+", "/", "//#", "a", "a/#", "a/+/b", "$SYS/#"];
        let tree = tree(&filters);

        for filter in filters {
            let found = tree.filters_of(|known| *known == filter);
            assert_eq!(found, [(filter.to_owned(), &filter)]);
        }
    }

    #[test]
    fn removing_everything_leaves_nothing_behind() {
        let filters = ["a/b/c", "a/+/c", "a/#", "#", "+", "$SYS/#", "a//"];
        let mut tree = tree(&filters);

        for filter in filters {
            assert!(tree.remove(filter, |value| *value == filter));
            assert!(!tree.remove(filter, |value| *value == filter));
        }

        assert!(tree.is_empty());
        assert!(tree.edges.is_empty());
        assert_eq!(tree.nodes.len(), tree.free.len() + 1);
    }

    #[test]
    fn the_same_value_is_replaced() {
        let mut tree = TopicTree::new();
        assert!(tree.insert("a", (1, "old"), |known| known.0 == 1));
        assert!(!tree.insert("a", (1, "new"), |known| known.0 == 1));

        let mut found = Vec::new();
        tree.visit_matches("a", |value| found.push(*value));
        assert_eq!(found, [(1, "new")]);
    }
}
