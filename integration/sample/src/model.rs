//! What the GPU must have computed, in closed form.
//!
//! `advance` maps word `i` from `x` to `A·x + C + s·M + i` (mod 2³²) in step `s`. From zero, after any number of steps,
//! that is `S·i + T` with two numbers that follow the same recurrence: `S ← A·S + 1`, `T ← A·T + C + s·M`.

const A: u32 = 1_664_525;
const C: u32 = 1_013_904_223;
const M: u32 = 2_654_435_761;

/// The closed form of one buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Line {
    /// Factor of the index.
    pub slope: u32,
    /// Value at index 0.
    pub offset: u32,
}

impl Line {
    /// One step of `advance`.
    pub fn advance(&mut self, step: u32) {
        self.slope = self.slope.wrapping_mul(A).wrapping_add(1);
        self.offset = self.offset.wrapping_mul(A).wrapping_add(C).wrapping_add(step.wrapping_mul(M));
    }

    /// One `combine` of `other` into this one.
    pub fn combine(&mut self, other: Line) {
        self.slope = self.slope.wrapping_add(other.slope);
        self.offset = self.offset.wrapping_add(other.offset);
    }

    /// Word `i`.
    pub fn at(&self, i: usize) -> u32 {
        self.slope.wrapping_mul(i as u32).wrapping_add(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closed_form_is_the_recurrence() {
        let mut words = [0u32; 50];
        let mut sums = [0u32; 50];
        let (mut line, mut sum) = (Line::default(), Line::default());
        for step in 0..20u32 {
            for (i, w) in words.iter_mut().enumerate() {
                *w = w
                    .wrapping_mul(A)
                    .wrapping_add(C)
                    .wrapping_add(step.wrapping_mul(M))
                    .wrapping_add(i as u32);
                sums[i] = sums[i].wrapping_add(*w);
            }
            line.advance(step);
            sum.combine(line);
            for i in 0..50 {
                assert_eq!((line.at(i), sum.at(i)), (words[i], sums[i]), "step {step} word {i}");
            }
        }
    }
}
