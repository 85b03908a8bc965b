/** What the module exports. A thread calls one of these until it returns 0: each call does one unit of the job. */
import { JOB_ABORT, JOB_NEXT, JOB_UNIT_COUNT, JOB_UNITS, UNIT_BYTES } from '../job.ts';
import { attendUnit } from './attend.ts';
import { prepareUnit } from './prepare.ts';

/** Takes the job's next unit; 0 when there is none or the job was stopped. */
function takeUnit(job: usize): usize {
  if (atomic.load<i32>(job, JOB_ABORT)) return 0;
  const unit = atomic.add<i32>(job, 1, JOB_NEXT);
  return unit < load<i32>(job, JOB_UNIT_COUNT) ? load<usize>(job, JOB_UNITS) + <usize>unit * UNIT_BYTES : 0;
}

export function prepare(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  prepareUnit(job, unit, scratch);
  return 1;
}

export function attend(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  attendUnit(job, unit, scratch);
  return 1;
}

/**
 * The instruction that the products rest on, for 16 bytes each at `a` and `b`, to four integers at `out`: engines were seen
 * to accept it and compute it wrongly.
 */
export function probe(a: usize, b: usize, out: usize): void {
  if (ASC_FEATURE_RELAXED_SIMD) {
    v128.store(
      out,
      i32x4.relaxed_dot_i8x16_i7x16_add_s(v128.load(a), v128.load(b), v128.load(out)),
    );
  } else {
    v128.store(out, i32x4.add(v128.load(out), i32x4.dot_i16x8_s(v128.load(a), v128.load(b))));
  }
}
