//! The figures as a picture: a pair of bars a row, on a scale of powers of ten.

use std::path::Path;

use plotters::prelude::*;

use super::rows::Row;
use crate::error::Error;

const WIDTH: u32 = 960;
const ROW_HEIGHT: u32 = 34;
const KVM: RGBColor = RGBColor(0xb0, 0x5a, 0x3c);
const NESTLING: RGBColor = RGBColor(0x2f, 0x6f, 0x9f);

/// Draws the rows into a file.
///
/// # Errors
/// If it cannot be written.
pub(super) fn write(path: &Path, rows: &[Row]) -> Result<(), Error> {
    let failed =
        |cause: String| Error::File { option: "--svg", path: path.to_owned(), cause: std::io::Error::other(cause) };
    draw(path, rows).map_err(|cause| failed(cause.to_string()))
}

fn draw(path: &Path, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    let height = 90 + ROW_HEIGHT * rows.len() as u32;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let values = rows.iter().flat_map(|row| [row.kvm, row.nestling]).flatten();
    let most = values.fold(10.0, f64::max) * 3.0;
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption("Executed instructions: KVM and Nestling on one emulated machine", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(210)
        .build_cartesian_2d((1.0..most).log_scale(), 0.0..count)?;
    let name = |place: &f64| {
        let row = rows.len().checked_sub(1 + *place as usize).and_then(|index| rows.get(index));
        row.map_or_else(String::new, |row| format!("{} ({})", row.op, row.mmu.name()))
    };
    chart.configure_mesh().disable_y_mesh().y_labels(0).draw()?;
    for (index, row) in rows.iter().enumerate() {
        let bottom = count - 1.0 - index as f64;
        let label = name(&bottom);
        let text = EmptyElement::at((1.0, bottom + 0.6)) + Text::new(label, (-200, -7), ("sans-serif", 13).into_font());
        chart.draw_series([text])?;
        for (value, low, color) in [(row.kvm, 0.5, KVM), (row.nestling, 0.1, NESTLING)] {
            let Some(value) = value else { continue };
            let bar = Rectangle::new([(1.0, bottom + low), (value.max(1.0), bottom + low + 0.36)], color.filled());
            chart.draw_series([bar])?;
            let shown = EmptyElement::at((value.max(1.0), bottom + low + 0.3))
                + Text::new(format!("{value:.0}"), (4, -4), ("sans-serif", 11).into_font());
            chart.draw_series([shown])?;
        }
    }
    for (words, x, color) in [("KVM", 20, KVM), ("Nestling", 80, NESTLING)] {
        area.draw(&Text::new(words, (x, height as i32 - 24), ("sans-serif", 14).into_font().color(&color)))?;
    }
    area.present()?;
    Ok(())
}
