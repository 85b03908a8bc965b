/**
 * The part of onnxruntime's JavaScript API that cutting uses, in its structure alone: onnxruntime-web, onnxruntime-node and
 * the copies inside other bundles all fit, whichever version their types are.
 */

export type OrtDimension = number | string;

export interface OrtTensor {
  readonly type: string;
  readonly dims: readonly number[];
  readonly location: string;
  readonly size: number;
  /** Elements; throws when they are not in the memory of this process. */
  readonly data: unknown;
  readonly gpuBuffer?: unknown;
  getData(releaseData?: boolean): Promise<unknown>;
  dispose(): void;
}

export interface OrtTensorConstructor {
  new (type: string, data: unknown, dims?: readonly number[]): OrtTensor;
  fromGpuBuffer?(buffer: unknown, options: Readonly<Record<string, unknown>>): OrtTensor;
}

export interface OrtValueMetadata {
  readonly name: string;
  readonly isTensor: boolean;
  readonly type?: string;
  readonly shape?: readonly OrtDimension[];
}

export type OrtFeeds = Readonly<Record<string, OrtTensor>>;
export type OrtFetches = Readonly<Record<string, OrtTensor | null>>;
export type OrtResults = Record<string, OrtTensor>;

export interface OrtSession {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata?: readonly OrtValueMetadata[];
  readonly outputMetadata?: readonly OrtValueMetadata[];
  run(feeds: OrtFeeds, fetches: OrtFetches | readonly string[], options?: object): Promise<OrtResults>;
  release(): Promise<void>;
  startProfiling(): void;
  endProfiling(): void;
}

/** Session options that cutting reads; all others are passed on untouched. */
export interface OrtSessionOptions {
  readonly executionProviders?: readonly (string | { readonly name: string; readonly device?: unknown })[];
  readonly externalData?: readonly (string | { readonly path: string; readonly data: unknown })[];
  readonly preferredOutputLocation?: string | Readonly<Record<string, string>>;
  readonly enableGraphCapture?: boolean;
  readonly optimizedModelFilePath?: string;
  readonly extra?: Readonly<Record<string, unknown>>;
  readonly [name: string]: unknown;
}

export type CreateArguments = readonly unknown[];

/** `InferenceSession` as onnxruntime-common defines it: a class around a handler. */
export interface OrtSessionClass {
  create(...args: never[]): Promise<object>;
}

/** What `withSageAttention` takes: a namespace of onnxruntime. */
export interface OrtModule {
  readonly InferenceSession: OrtSessionClass;
  readonly Tensor: unknown;
  readonly env: unknown;
}

/** What `InferenceSession.run` of onnxruntime-common calls after it has checked its arguments. */
export interface OrtSessionHandler {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly OrtValueMetadata[];
  readonly outputMetadata: readonly OrtValueMetadata[];
  run(feeds: OrtFeeds, fetches: OrtFetches, options: object): Promise<OrtResults>;
  dispose(): Promise<void>;
  startProfiling(): void;
  endProfiling(): void;
}

/** Where sessions run, as far as attention between them is concerned. */
export type Engine = 'cpu' | 'webgpu';

export function versionsOf(ort: OrtModule): { readonly web?: string; readonly node?: string } {
  return (ort.env as { versions?: { web?: string; node?: string } } | undefined)?.versions ?? {};
}

export const isWeb = (ort: OrtModule): boolean => versionsOf(ort).node === undefined;

/** True where onnxruntime-web runs in a worker of its own, to which it gives the buffers of inputs and models away. */
export const isProxied = (ort: OrtModule): boolean =>
  (ort.env as { wasm?: { proxy?: boolean } } | undefined)?.wasm?.proxy === true;

/**
 * The engine that `options` select, or why attention has no place there. onnxruntime's default is the CPU in all its
 * packages.
 */
export function engineOf(ort: OrtModule, options: OrtSessionOptions): Engine | { readonly reason: string } {
  const names = (options.executionProviders ?? []).map((provider) =>
    typeof provider === 'string' ? provider : provider.name,
  );
  const first = names[0] ?? 'cpu';
  if (options.enableGraphCapture === true) return { reason: 'graph capture needs the graph in one piece' };
  if (options.optimizedModelFilePath) return { reason: 'the optimized model is written from the graph in one piece' };
  if (first === 'cpu' || first === 'wasm' || first === 'xnnpack') return 'cpu';
  if (first !== 'webgpu') return { reason: `execution provider '${first}' shares no tensors with SageAttention` };
  return isWeb(ort) ? 'webgpu' : { reason: "onnxruntime-node's WebGPU provider shares no buffers with other programs" };
}
