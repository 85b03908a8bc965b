/** What the module exports. A thread calls one of these until it returns 0: each call does one unit of the job. */
import {
  JOB_ABORT,
  JOB_NEXT,
  JOB_UNITS,
  JOB_UNIT_COUNT,
  UNIT_BYTES,
} from '../generated/fields.ts';
import { attendUnit } from './attend.ts';
import { backwardUnit, prepareBackwardUnit, storeGradientsUnit } from './backward.ts';
import { dot, OneStep, onesOf, setTwoSteps, TwoSteps, twoSteps } from './dot.ts';
import { exactUnit } from './exact.ts';
import { multiply } from './exact-products.ts';
import { poolUnit } from './pool.ts';
import { prepareUnit } from './prepare.ts';

export { multiply, setTwoSteps, twoSteps };

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

export function prepareBackward(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  prepareBackwardUnit(job, unit, scratch);
  return 1;
}

export function backward(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  backwardUnit(job, unit, scratch);
  return 1;
}

export function storeGradients(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  storeGradientsUnit(job, unit, scratch);
  return 1;
}

export function exact(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  exactUnit(job, unit, scratch);
  return 1;
}

export function pool(job: usize, scratch: usize): i32 {
  const unit = takeUnit(job);
  if (unit == 0) return 0;
  poolUnit(job, unit, scratch);
  return 1;
}

/**
 * The dot product that the products rest on, as they take it, for 16 bytes each at `a` and `b`, to four integers at `out`: engines were seen
 * to accept it and compute it wrongly.
 */
export function probe(a: usize, b: usize, out: usize): void {
  const x = v128.load(a);
  const y = v128.load(b);
  const sum = v128.load(out);
  v128.store(out, twoSteps() ? dot<TwoSteps>(x, y, sum, onesOf(1)) : dot<OneStep>(x, y, sum, onesOf(1)));
}

/**
 * One vector each of the other relaxed instructions, from vectors at `input` to vectors at `out`: product of Q15, selection of
 * bytes, truncation, multiply-add.
 */
export function probeOthers(input: usize, out: usize): void {
  const factors0 = v128.load(input);
  const factors1 = v128.load(input, 16);
  const bytes = v128.load(input, 32);
  const indices = v128.load(input, 48);
  const fractions = v128.load(input, 64);
  const a = v128.load(input, 80);
  const b = v128.load(input, 96);
  const c = v128.load(input, 112);
  if (ASC_FEATURE_RELAXED_SIMD) {
    v128.store(out, i16x8.relaxed_q15mulr_s(factors0, factors1));
    v128.store(out, i8x16.relaxed_swizzle(bytes, indices), 16);
    v128.store(out, i32x4.relaxed_trunc_f32x4_s(fractions), 32);
    v128.store(out, f32x4.relaxed_madd(a, b, c), 48);
  } else {
    v128.store(out, i16x8.q15mulr_sat_s(factors0, factors1));
    v128.store(out, i8x16.swizzle(bytes, indices), 16);
    v128.store(out, i32x4.trunc_sat_f32x4_s(fractions), 32);
    v128.store(out, f32x4.add(f32x4.mul(a, b), c), 48);
  }
}
