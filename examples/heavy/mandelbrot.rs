//! Processes draw the tiles of a picture straight into one shared array, and the program writes it as a PNG.
//!
//! ```text
//! mandelbrot picture.png
//! ```

use futures::TryStreamExt;
use multiprocess::{self as mp, Array, Pool};
use std::fs::File;

const WIDTH: usize = 480;
const HEIGHT: usize = 320;
const TILE: usize = 80;
const LIMIT: u32 = 200;

type Pixel = [u8; 3];

/// Steps until the point is known to leave.
fn steps(re: f64, im: f64) -> u32 {
    let (mut x, mut y) = (0.0, 0.0);
    for step in 0..LIMIT {
        if x * x + y * y > 4.0 {
            return step;
        }
        (x, y) = (x * x - y * y + re, 2.0 * x * y + im);
    }
    LIMIT
}

fn colour(steps: u32) -> Pixel {
    match steps {
        LIMIT => [0; 3],
        steps => [steps * 9 % 256, steps * 5 % 256, 64 + steps * 3 % 192].map(|light| light as u8),
    }
}

/// Draws one tile, whose upper left corner this is, in whichever process it is called.
fn draw((picture, left, top): (Array<Pixel>, usize, usize)) -> u32 {
    for row in top..top + TILE {
        for column in left..left + TILE {
            let re = (column as f64 + 0.5) / WIDTH as f64 * 3.0 - 2.1;
            let im = (row as f64 + 0.5) / HEIGHT as f64 * 2.0 - 1.0;
            picture.set(row * WIDTH + column, colour(steps(re, im)));
        }
    }
    std::process::id()
}

fn write(path: &str, pixels: &[Pixel]) -> mp::Result<()> {
    let mut encoder = png::Encoder::new(File::create(path)?, WIDTH as u32, HEIGHT as u32);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().map_err(mp::Error::other)?;
    writer.write_image_data(pixels.as_flattened()).map_err(mp::Error::other)
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let path = std::env::args().nth(1).ok_or_else(|| mp::Error::other("usage: mandelbrot picture.png"))?;
        let picture = Array::<Pixel>::zeroed(WIDTH * HEIGHT)?;
        let pool = Pool::new(mp::cpu_count())?;
        let corners = (0..HEIGHT).step_by(TILE).flat_map(|top| (0..WIDTH).step_by(TILE).map(move |left| (left, top)));
        let tiles: Vec<_> = corners.map(|(left, top)| (picture.clone(), left, top)).collect();
        let count = tiles.len();
        let pids: std::collections::BTreeSet<u32> = pool.imap_unordered(draw, tiles).chunksize(1).try_collect().await?;
        write(&path, &picture.lock().await?)?;
        println!("{count} tiles of {WIDTH} x {HEIGHT} pixels by {} processes", pids.len());
        Ok(())
    })
}
