//! The picture that `mandelbrot` writes is one of the set.

#[path = "../../tests/programs/mod.rs"]
mod programs;

use std::collections::BTreeSet;
use std::time::Duration;

#[test]
fn the_mandelbrot_picture_is_what_it_should_be() {
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/mandelbrot-checked.png");
    let output = programs::finish(programs::start(&programs::example("mandelbrot"), [path]), Duration::from_secs(30));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.width, info.height, info.color_type), (480, 320, png::ColorType::Rgb));
    let rows: Vec<_> = bytes.as_chunks::<3>().0.chunks(480).collect();
    // 0 and -1 are in the set, the corners leave at once, and what is above the real axis is below it too.
    let at = |re: f64, im: f64| rows[((im + 1.0) * 160.0) as usize][((re + 2.1) * 160.0) as usize];
    assert_eq!((at(0.0, 0.0), at(-1.0, 0.0)), ([0; 3], [0; 3]));
    assert!([rows[0][0], rows[319][0], rows[0][479], rows[319][479]].iter().all(|corner| *corner != [0; 3]));
    assert!((0..160).all(|row| rows[row] == rows[319 - row]));
    let colours: BTreeSet<_> = rows.iter().copied().flatten().collect();
    assert!(colours.len() > 30, "{} colours", colours.len());
    let inside = rows.iter().copied().flatten().filter(|pixel| **pixel == [0; 3]).count();
    // Its area is 1.507, of a picture of 3 by 2.
    assert!((0.24..0.27).contains(&(inside as f64 / (480.0 * 320.0))), "{inside} pixels are inside");
}
