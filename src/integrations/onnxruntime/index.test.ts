/** What the types promise; `tsc` checks this file. */
import * as ort from 'onnxruntime-node';
import type * as ortWeb from 'onnxruntime-web';
import { describe, expect, expectTypeOf, it } from 'vitest';
import { type AttentionReport, type SageAttentionSession, withSageAttention } from './index.ts';

describe('withSageAttention', () => {
  it('has the whole surface of onnxruntime', () => {
    const sage = withSageAttention(ort);
    expect(Object.keys(sage)).toEqual(expect.arrayContaining(Object.keys(ort)));
    expect(sage.Tensor).toBe(ort.Tensor);
    expect(sage.env).toBe(ort.env);
    expectTypeOf(sage).toExtend<typeof ort>();
    expectTypeOf(sage.Tensor).toEqualTypeOf<typeof ort.Tensor>();
    expectTypeOf<ReturnType<typeof withSageAttention<typeof ortWeb>>>().toExtend<typeof ortWeb>();
  });

  it('gives sessions of onnxruntime with a report, and takes its options and no others', () => {
    const { InferenceSession } = withSageAttention(ort);
    type Session = ort.InferenceSession & SageAttentionSession;
    const open = {
      file: () => InferenceSession.create('model.onnx', { executionProviders: ['cpu'] }),
      bytes: () => InferenceSession.create(new Uint8Array()),
      buffer: () => InferenceSession.create(new ArrayBuffer(8), 4, 4, { enableCpuMemArena: true }),
      // @ts-expect-error a level that onnxruntime does not have
      level: () => InferenceSession.create('model.onnx', { graphOptimizationLevel: 'most' }),
      // @ts-expect-error a misspelt option
      option: () => InferenceSession.create('model.onnx', { executionProvider: ['cpu'] }),
    };
    expectTypeOf(open.file).returns.resolves.toExtend<Session>();
    expectTypeOf(open.bytes).returns.resolves.toExtend<Session>();
    expectTypeOf(open.buffer).returns.resolves.toExtend<Session>();
    expectTypeOf<Session['sageAttention']>().toEqualTypeOf<readonly AttentionReport[]>();
  });
});
