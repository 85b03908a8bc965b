/**
 * SageAttention under onnxruntime: every model that an onnxruntime opens runs its attention with the kernels of this
 * package.
 *
 * ```ts
 * import * as ort from 'onnxruntime-web';
 * import { withSageAttention } from 'sageattention/onnxruntime';
 * const session = await withSageAttention(ort).InferenceSession.create('model.onnx');
 * ```
 *
 * @module sageattention/onnxruntime
 */
import { InvalidArgumentError } from '../../errors.ts';
import { type SageAttentionOptions, validateSageAttentionOptions } from './options.ts';
import type { CreateArguments, OrtModule, OrtSession, OrtSessionHandler } from './ort.ts';
import { holdingEventLoop } from './session/event-loop.ts';
import { type CreateSession, openModel } from './session/open.ts';
import type { AttentionReport } from './session/report.ts';

export { enableNodeWebgpu } from './node-webgpu.ts';
export { DEFAULT_MIN_TOKENS, type SageAttentionOptions } from './options.ts';
export type { OrtModule } from './ort.ts';
export type { AttentionReport } from './session/report.ts';

/** A session with what became of the attentions of its model. */
export interface SageAttentionSession {
  /** One entry for each attention found; computed anew at each reading. */
  readonly sageAttention: readonly AttentionReport[];
}

type SessionOf<T extends OrtModule> = Awaited<ReturnType<T['InferenceSession']['create']>> & SageAttentionSession;
/** Options of the last overload of `create`; all overloads take the same. */
type SessionOptionsOf<T extends OrtModule> = Parameters<T['InferenceSession']['create']>[1];

/** A namespace of onnxruntime whose sessions say what became of their attention. */
export type WithSageAttention<T extends OrtModule> = {
  readonly InferenceSession: {
    create(model: string | Uint8Array | ArrayBufferLike, options?: SessionOptionsOf<T>): Promise<SessionOf<T>>;
    create(
      buffer: ArrayBufferLike,
      byteOffset: number,
      byteLength?: number,
      options?: SessionOptionsOf<T>,
    ): Promise<SessionOf<T>>;
  };
} & T;

/**
 * The same onnxruntime with `InferenceSession.create` replaced. `ort` itself is not changed.
 *
 * @param ort `onnxruntime-web`, `onnxruntime-web/webgpu`, `onnxruntime-node`
 * @throws {InvalidArgumentError} a wrong option
 */
export function withSageAttention<T extends OrtModule>(
  ort: T,
  options: SageAttentionOptions = {},
): WithSageAttention<T> {
  validateSageAttentionOptions(options);
  const original = ort.InferenceSession;
  const create = bindCreate(original);
  // A Proxy, not a subclass: `new`, `instanceof` and everything else behave as on the class itself.
  const InferenceSession = new Proxy(original, {
    get: (target, name, receiver) =>
      name === 'create'
        ? (...args: CreateArguments) => open(ort, original, create, args, options)
        : Reflect.get(target, name, receiver),
  });
  const replaced: object = { ...ort, InferenceSession };
  const inner = (ort as { default?: unknown }).default;
  if (typeof inner === 'object') Object.assign(replaced, { default: { ...inner, InferenceSession } });
  return replaced as WithSageAttention<T>;
}

/** What was installed on an `InferenceSession` class: its original `create`, and the one that replaced it. */
const installed = new WeakMap<object, { readonly before: unknown; readonly now: unknown }>();

/**
 * Replaces `create` on the `InferenceSession` class itself, so that every program that shares the class (transformers.js
 * and the page that imports the same onnxruntime) gets it.
 *
 * @returns a function that puts the class back as it was
 * @throws {InvalidArgumentError} `already-installed`, until the function that it gave has been called
 */
export function installSageAttention(ort: OrtModule, options: SageAttentionOptions = {}): () => void {
  validateSageAttentionOptions(options);
  const target = ort.InferenceSession as { create: unknown };
  if (installed.has(target)) {
    const expected = 'an InferenceSession without SageAttention';
    throw new InvalidArgumentError('already-installed', 'ort', expected, 'one on which it is already installed');
  }
  const before = target.create;
  const create = bindCreate(ort.InferenceSession);
  const now = (...args: CreateArguments) => open(ort, ort.InferenceSession, create, args, options);
  target.create = now;
  installed.set(target, { before, now });
  return () => {
    if (installed.get(target)?.now !== now) return;
    installed.delete(target);
    if (target.create === now) target.create = before;
  };
}

/** Reports of sessions that were opened through this package. */
const reports = new WeakMap<object, () => AttentionReport[]>();

/**
 * What became of the attentions of a session's model; undefined, with a warning, for a session that was opened without this package:
 * before it was installed, or by another copy of onnxruntime.
 */
export function attentionReportOf(session: object): readonly AttentionReport[] | undefined {
  const report = reports.get(session);
  if (report === undefined) {
    console.warn(
      'sageattention: this session was opened without SageAttention, before it was installed or by another copy of onnxruntime',
    );
  }
  return report?.();
}

function bindCreate(sessionClass: object): CreateSession {
  const { create } = sessionClass as { create: CreateSession };
  return create.bind(sessionClass);
}

async function open(
  ort: OrtModule,
  sessionClass: object,
  create: CreateSession,
  args: CreateArguments,
  options: SageAttentionOptions,
): Promise<OrtSession> {
  const warn = (message: string) => console.warn(`sageattention: ${message}`);
  const { cut, plain, report } = await holdingEventLoop(() => openModel(ort, create, args, options, warn));
  // onnxruntime-common's own class around another handler: arguments of `run` are checked as always.
  const SessionClass = sessionClass as new (handler: OrtSessionHandler) => OrtSession;
  const session = cut === undefined ? (plain as OrtSession) : new SessionClass(cut);
  reports.set(session, report);
  Object.defineProperty(session, 'sageAttention', { configurable: true, get: report });
  return session;
}
