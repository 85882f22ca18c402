//! The names of fields and variants that this thread has written, and which of them the current message uses.
//!
//! Lists of names are the nodes of a trie: a list is its parent's and one name more, and below each root are the lists that
//! began with it. A struct's root is its type's name, which is no part of the list; a variant's list is its root alone.

use super::{Result, fail};
use std::collections::BTreeMap;

/// A list of names in the trie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct List(u32);

/// No list.
const NIL: u32 = u32::MAX;
/// The list without names.
const EMPTY: u32 = 0;
/// A trie of more lists is let go of after its message: a type whose fields are left out one by one has many.
const MOST_LISTS: usize = 1 << 14;
/// Where roots are looked up first.
const RECENT: usize = 32;

/// A shape is written as a `u16` if it is less than this.
pub(super) const WIDE: u16 = u16::MAX;

struct Node {
    name: &'static str,
    parent: u32,
    child: u32,
    sibling: u32,
    /// The message in which it has the number `shape`.
    message: u64,
    shape: u32,
    /// Its encoding in a table, once it has been in one.
    written: Vec<u8>,
}

pub(super) struct Names {
    nodes: Vec<Node>,
    /// By the place and length of the type's or variant's name.
    roots: BTreeMap<(usize, usize), u32>,
    recent: [(usize, usize, u32); RECENT],
    message: u64,
    /// The lists of this message, by their shape.
    used: Vec<u32>,
}

impl Default for Names {
    fn default() -> Self {
        let mut names = Self {
            nodes: Vec::new(),
            roots: BTreeMap::new(),
            recent: [(0, 0, EMPTY); RECENT],
            message: 0,
            used: Vec::new(),
        };
        names.add("", NIL);
        names
    }
}

impl Names {
    /// Returns `true` if they are worth keeping for the next message.
    pub(super) fn are_few(&self) -> bool {
        self.nodes.len() <= MOST_LISTS
    }

    /// Begins a message.
    pub(super) fn begin(&mut self) {
        self.message += 1;
        self.used.clear();
    }

    pub(super) fn is_unused(&self) -> bool {
        self.used.is_empty()
    }

    fn add(&mut self, name: &'static str, parent: u32) -> u32 {
        let node = Node { name, parent, child: NIL, sibling: NIL, message: 0, shape: 0, written: Vec::new() };
        self.nodes.push(node);
        self.nodes.len() as u32 - 1
    }

    /// The list that a type or variant of this name begins with.
    #[inline(always)]
    pub(super) fn root(&mut self, name: &'static str) -> List {
        let (at, len) = (name.as_ptr() as usize, name.len());
        let slot = (at ^ (at >> 5) ^ (at >> 10)) % RECENT;
        let recent = self.recent[slot];
        if (recent.0, recent.1) == (at, len) {
            return List(recent.2);
        }
        self.root_elsewhere(name, slot)
    }

    #[cold]
    #[inline(never)]
    fn root_elsewhere(&mut self, name: &'static str, slot: usize) -> List {
        let (at, len) = (name.as_ptr() as usize, name.len());
        let node = match self.roots.get(&(at, len)) {
            Some(node) => *node,
            None => self.add(name, NIL),
        };
        self.roots.insert((at, len), node);
        self.recent[slot] = (at, len, node);
        List(node)
    }

    /// The list with one more name.
    #[inline(always)]
    pub(super) fn longer(&mut self, list: List, name: &'static str) -> List {
        // Mostly it is the next: guessed, so that no load waits for another.
        if let Some(next) = self.nodes.get(list.0 as usize + 1)
            && next.parent == list.0
            && std::ptr::eq(next.name, name)
        {
            return List(list.0 + 1);
        }
        self.longer_elsewhere(list, name)
    }

    #[inline(never)]
    fn longer_elsewhere(&mut self, list: List, name: &'static str) -> List {
        let mut at = self.nodes[list.0 as usize].child;
        while at != NIL {
            let node = &self.nodes[at as usize];
            if std::ptr::eq(node.name, name) || node.name == name {
                return List(at);
            }
            at = node.sibling;
        }
        let new = self.add(name, list.0);
        let parent = &mut self.nodes[list.0 as usize];
        let sibling = std::mem::replace(&mut parent.child, new);
        self.nodes[new as usize].sibling = sibling;
        List(new)
    }

    /// The shape of a struct whose fields were `list`.
    #[inline(always)]
    pub(super) fn shape_of_struct(&mut self, list: List) -> Result<u32> {
        let node = &self.nodes[list.0 as usize];
        match node.parent {
            NIL => self.shape(List(EMPTY)),
            _ if node.message == self.message => Ok(node.shape),
            _ => self.shape(list),
        }
    }

    /// The shape of `list` in this message.
    #[inline]
    pub(super) fn shape(&mut self, list: List) -> Result<u32> {
        let node = &mut self.nodes[list.0 as usize];
        if node.message != self.message {
            let Ok(shape) = u32::try_from(self.used.len()) else { return fail("it has too many shapes of structs") };
            (node.message, node.shape) = (self.message, shape);
            self.used.push(list.0);
        }
        Ok(node.shape)
    }

    /// The names of a struct of this shape; `None` if it is wide, or none of this message.
    pub(super) fn of_shape(&self, shape: u16) -> Option<Vec<&'static str>> {
        let list = *self.used.get(usize::from(shape)).filter(|_| shape < WIDE)?;
        Some(names_of(&self.nodes, list))
    }

    /// Appends the table of this message.
    pub(super) fn write_table(&mut self, to: &mut Vec<u8>) -> Result<()> {
        to.extend_from_slice(&(self.used.len() as u32).to_le_bytes());
        for &list in &self.used {
            if self.nodes[list as usize].written.is_empty() {
                self.nodes[list as usize].written = written(&self.nodes, list)?;
            }
            to.extend_from_slice(&self.nodes[list as usize].written);
        }
        Ok(())
    }
}

/// The names of a list.
fn names_of(nodes: &[Node], list: u32) -> Vec<&'static str> {
    let is_root = |list: u32| nodes[list as usize].parent == NIL;
    let mut names = Vec::new();
    if is_root(list) && list != EMPTY {
        names.push(nodes[list as usize].name);
    }
    let mut at = list;
    while !is_root(at) {
        names.push(nodes[at as usize].name);
        at = nodes[at as usize].parent;
    }
    names.reverse();
    names
}

/// Encodes a list for a table.
#[cold]
fn written(nodes: &[Node], list: u32) -> Result<Vec<u8>> {
    let names = names_of(nodes, list);
    let mut out = vec![0; 6];
    for name in &names {
        let Ok(len) = u16::try_from(name.len()) else { return fail("the name of a field is longer than 65,535 bytes") };
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(name.as_bytes());
    }
    let (Ok(count), Ok(len)) = (u16::try_from(names.len()), u32::try_from(out.len() - 6)) else {
        return fail("it has a struct of more than 65,535 fields");
    };
    out[..2].copy_from_slice(&count.to_le_bytes());
    out[2..6].copy_from_slice(&len.to_le_bytes());
    Ok(out)
}
