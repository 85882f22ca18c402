//! Recognises the visitors of serde and its companions by the names of their types.

/// Returns `true` if serde derived the visitor `V`. Others are known to take a struct as a map, as text formats give it to them;
/// whether also as a sequence is not. The name is serde's convention: were it to change, structs would be read by names.
/// A visitor that wraps one of serde's is another.
pub(super) fn is_derived<V>() -> bool {
    let name = std::any::type_name::<V>();
    let path = if name.ends_with('>') { without_arguments(name) } else { name };
    path.ends_with("::__Visitor")
}

/// The path of a type whose name ends with generic arguments.
fn without_arguments(name: &str) -> &str {
    let mut depth = 0;
    let start = name.bytes().rposition(|byte| {
        depth += i32::from(byte == b'>') - i32::from(byte == b'<');
        byte == b'<' && depth == 0
    });
    start.map_or(name, |at| &name[..at])
}

/// Returns `true` if `V` is the visitor of serde's own buffer, of its copy in `serde_with`, or one of `erased-serde`, which may hide the first. The buffer
/// offers bytes that are UTF-8 as a text to the variants of an untagged enum. The names are those crates' own: were
/// they to change, such bytes could be taken for a text.
pub(super) fn is_buffer<V>() -> bool {
    let name = std::any::type_name::<V>();
    const BUFFERS: [&str; 4] = [
        "::content::ContentVisitor",
        "::content::TagOrContentVisitor",
        "serde_with::content::de::ContentVisitor",
        "erased_serde::de::Visitor",
    ];
    BUFFERS.iter().any(|buffer| name.contains(buffer))
}
