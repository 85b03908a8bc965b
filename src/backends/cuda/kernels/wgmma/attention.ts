/**
 * The `wgmma` attention kernel: INT8 QK^T and FP8 or FP16 PV, or both in the caller's FP16 or BF16, for sm_90a. docs/hopper.md draws the pipeline
 * and counts its clocks.
 *
 * A CTA has one producer warpgroup and `consumers` more. One thread of the producer sends K and V, 128 keys at a time,
 * through rings of stages in shared memory (TMA); each consumer owns 64 rows of Q and runs the online softmax of
 * FlashAttention in base 2 on them. `full` barriers count a stage's bytes in, `empty` barriers the warps that are done
 * with it. With schedule `ahead` a consumer issues QK^T of the next tile before PV of this one, so that tensor cores
 * work while it takes exponentials. A CTA goes through work items (a tile of Q rows of one head, or a split of its
 * keys) `gridDim` apart, so the producer fetches the next item's operands during the last one's epilogue.
 *
 * Names: g = lane / 4 and t = lane % 4. Of every 8 columns of the scores a thread owns columns 2t and 2t + 1 of rows g
 * and g + 8 of its warp's 16; register 4n + i holds row g + 8 * (i >> 1), column 8n + 2t + (i & 1). P in E4M3 is the A
 * fragment of the next product just as the thread has it, because V's tokens are stored in permuted order (see
 * `TOKEN_PERMUTATION`).
 */
import { mbarrierArrive, mbarrierWait } from '../../ptx/mbarrier.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { setMaxNReg, wgmmaWaitGroup } from '../../ptx/wgmma.ts';
import { LOG2_E } from '../parts/constants.ts';
import { Turns } from '../parts/turns.ts';
import type { WgmmaConfig } from './config.ts';
import { joinSplits, writeResults, writeWideResults } from './epilogue.ts';
import { type Frame, makeFrame, writeOnes } from './frame.ts';
import { producer } from './producer.ts';
import {
  allColumns,
  type Descriptors,
  descriptorsOf,
  issueScores,
  issueValues,
  multiplyInChunks,
  promote,
  rescale,
  type Stages,
  seedScores,
  testNextStages,
} from './products.ts';
import { loadQueryScales, quantizeQuery } from './quantize-query.ts';
import { type ConsumerThread, consumerThread, Rows } from './rows.ts';
import { softmax } from './softmax.ts';
import { type Item, makeKeyScales, makeOutput, makeScores, makeSoftmaxState } from './state.ts';
import { Walk } from './walk.ts';
import { eachWork, type Work } from './work.ts';

/** The kernel of one configuration. */
export function wgmmaAttention(config: WgmmaConfig): Kernel {
  const frame = makeFrame(config);
  const { b, warpgroup } = frame;
  if (config.onesColumn) writeOnes(frame);
  b.barSync();
  b.if(
    b.setp('eq', warpgroup, 0),
    () => producer(frame),
    () => consumer(frame),
  );
  return b.build();
}

/** What a consumer keeps from item to item, and how it meets the other warps. */
interface Consumer {
  readonly frame: Frame;
  readonly thread: ConsumerThread;
  readonly descriptors: Descriptors;
  readonly stages: Stages;
  /** Parity of the phase in which Q's next tile lands. */
  readonly queryParity: Reg<'u32'>;
  readonly turns: Turns;
}

function consumer(frame: Frame): void {
  const { b, config, keys, values, exact } = frame;
  if (config.registers !== undefined) setMaxNReg(b, 'inc', config.registers.consumer);
  b.section('consumer');
  const thread = consumerThread(frame);
  const descriptors = descriptorsOf(frame, thread);
  const [key, value] = [keys.place(), values.place()];
  const queryParity = b.constant('u32', 0);
  const stages = { key, value, keyReady: b.reg('pred'), valueReady: b.reg('pred') };
  const turns = new Turns(b, thread.group, config.pingPong ? config.consumers : undefined);
  const self: Consumer = { frame, thread, descriptors, stages, queryParity, turns };
  const scores = makeScores(frame);
  const inspected = exact ? values.place() : undefined;

  eachWork(frame, (work) => {
    const rows = new Rows(frame, thread, work);
    const queryScale = queryScales(frame, thread, work, rows);

    b.section('sums and outputs');
    const state = makeSoftmaxState(frame);
    const output = makeOutput(frame, state);
    const walk = new Walk(frame, work);
    const scales = makeKeyScales(frame, thread, work);
    attend(self, { frame, thread, work, rows, queryScale, scores, state, output, walk, scales, inspected });
  });
}

/** Scales of this thread's rows, in base 2. */
function queryScales(frame: Frame, thread: ConsumerThread, work: Work, rows: Rows): Reg<'f32'>[] {
  const { b, fused, exact, smScale } = frame;
  if (exact) return [b.mul(b.loadParameter(smScale), LOG2_E)];
  return fused ? quantizeQuery(frame, thread, work, rows) : loadQueryScales(frame, rows);
}

/** One item of work: every tile of its keys, then its rows' results. */
function attend(self: Consumer, item: Item): void {
  const { frame, thread, queryParity } = self;
  const { b, config, fused, exact, barriers, queryFull, queryEmpty } = frame;
  if (!fused) {
    mbarrierWait(b, barriers, queryParity, queryFull);
    b.xor(queryParity, 1, queryParity);
  }
  const handBack = () => b.when(thread.leader, () => mbarrierArrive(b, barriers, queryEmpty));
  b.if(
    item.walk.exists(),
    () => {
      item.walk.start(item.scales);
      if (config.schedule === 'ahead') attendAhead(self, item);
      else attendSerially(self, item);
    },
    exact ? handBack : undefined,
  );
  if (!fused && !exact) handBack();

  b.section('epilogue');
  if (config.alignedOutput) writeWideResults(item);
  else writeResults(item);
  joinSplits(item);
}

/**
 * After QK^T of the tile at hand: hands Q back if it was the last. The next item's Q comes during what is left of this
 * one, which counts where items are short.
 */
function releaseQuery({ frame, thread, walk }: Item): void {
  const { b, exact, barriers, queryEmpty } = frame;
  if (!exact) return;
  b.when(b.andPred(walk.isLast(), thread.leader), () => mbarrierArrive(b, barriers, queryEmpty));
}

/** QK^T of the next tile is issued before PV of this one, so that tensor cores work while exponentials are taken. */
function attendAhead({ frame, thread, descriptors, stages, turns }: Consumer, item: Item): void {
  const { b, keys, values } = frame;
  const { scores, walk } = item;
  const { keyReady, valueReady } = stages;
  b.section('first S = Q K^T');
  seedScores(frame, scores);
  issueScores(frame, descriptors, stages, scores);
  wgmmaWaitGroup(b, 0);
  keys.release(stages.key, thread.leader);
  releaseQuery(item);
  softmax(item, () => testNextStages(frame, stages));
  seedScores(frame, scores);
  rescale(item);
  walk.advance();
  b.loop(
    () => walk.exists(),
    () => {
      turns.take();
      b.section('S = Q K^T of the next tile');
      issueScores(frame, descriptors, stages, scores, keyReady);
      b.section('O += P V');
      issueValues(item, descriptors, stages, allColumns(item), valueReady);
      turns.give();
      wgmmaWaitGroup(b, 1);
      keys.release(stages.key, thread.leader);
      releaseQuery(item);
      // A warp issues one ex2 every 8 clocks. The remaining work of the tile is emitted in the same basic block so that
      // ptxas can fill the gaps.
      softmax(item, () => {
        wgmmaWaitGroup(b, 0);
        values.release(stages.value, thread.leader);
        testNextStages(frame, stages);
        promote(item);
      });
      seedScores(frame, scores);
      rescale(item);
      walk.advance();
    },
  );
  b.section('last O += P V');
  issueValues(item, descriptors, stages, allColumns(item), valueReady);
  wgmmaWaitGroup(b, 0);
  values.release(stages.value, thread.leader);
  promote(item);
}

/** One product after the other: sums of PV may take the registers of the scores. */
function attendSerially({ frame, thread, descriptors, stages, turns }: Consumer, item: Item): void {
  const { b, keys, values } = frame;
  const { scores, walk } = item;
  b.loop(
    () => walk.exists(),
    () => {
      turns.take();
      b.section('S = Q K^T');
      seedScores(frame, scores);
      issueScores(frame, descriptors, stages, scores);
      wgmmaWaitGroup(b, 0);
      turns.give();
      keys.release(stages.key, thread.leader);
      releaseQuery(item);
      softmax(item);
      rescale(item);
      b.section('O += P V');
      multiplyInChunks(item, descriptors, stages);
      values.release(stages.value, thread.leader);
      walk.advance();
    },
  );
}
