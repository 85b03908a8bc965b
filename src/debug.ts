/**
 * `SAGEATTENTION_DEBUG=1..3`: prints what was chosen and what will run when a plan is made (calls of equal shape share one).
 *
 * 1. backend, kernel and tile;
 * 2. also every launch with its grid, and the bytes of memory;
 * 3. also the sources of the kernels, written to the folder `SAGEATTENTION_DEBUG_FOLDER` (default
 *    `sageattention-debug`).
 *
 * In Node and Deno these are environment variables and the lines go to stderr. Everywhere, and with precedence,
 * `globalThis` may have them as properties, in a worker too: `globalThis.SAGEATTENTION_DEBUG = 2`. In a browser the
 * lines go to the console, and sources into the object `globalThis.SAGEATTENTION_SOURCES`, by name.
 */
import { messageOf } from './errors.ts';

/** One kernel launch or dispatch. */
export interface DebugLaunch {
  readonly name: string;
  readonly grid: readonly number[];
  /** Bytes of memory on the chip that each thread block has. */
  readonly sharedBytes?: number;
  /** Extension of the source's file: `ptx`, `wgsl`. */
  readonly language: string;
  readonly source: () => string;
}

/** What a backend tells of a plan. */
export interface DebugPlan {
  readonly backend: string;
  readonly kernel: string;
  /** What was settled for this problem: accumulator, tile, threads. */
  readonly settings: Readonly<Record<string, unknown>>;
  readonly launches: readonly DebugLaunch[];
  /** Memory that the plan needs besides inputs and outputs. */
  readonly scratchBytes?: number;
}

interface Host {
  readonly process?: {
    readonly env?: Readonly<Record<string, string | undefined>>;
    getBuiltinModule?(name: 'node:fs'): typeof import('node:fs');
  };
  readonly Deno?: {
    readonly permissions: {
      querySync(of: { readonly name: 'env'; readonly variable: string }): { readonly state: string };
    };
  };
  readonly SAGEATTENTION_DEBUG?: unknown;
  readonly SAGEATTENTION_DEBUG_FOLDER?: unknown;
  SAGEATTENTION_SOURCES?: Record<string, string>;
}

const host = globalThis as Host;

/** Deno asks or throws where the program may not read a variable; a program that runs attention need not be allowed to. */
function environment(name: string): string | undefined {
  const { state } = host.Deno?.permissions.querySync({ name: 'env', variable: name }) ?? { state: 'granted' };
  return state === 'granted' ? host.process?.env?.[name] : undefined;
}

function setting(name: 'SAGEATTENTION_DEBUG' | 'SAGEATTENTION_DEBUG_FOLDER'): string | undefined {
  const value = host[name] ?? environment(name);
  return value === undefined ? undefined : String(value);
}

/** 0 unless the variable is 1, 2 or 3; anything above is 3. */
export function debugLevel(): number {
  const level = Math.floor(Number(setting('SAGEATTENTION_DEBUG') ?? 0));
  return level >= 1 ? Math.min(level, 3) : 0;
}

/** To stderr, or a browser's console: what a program prints on stdout stays its own. */
function say(line: string): void {
  const print = host.process?.getBuiltinModule === undefined ? console.info : console.error;
  print(`sageattention: ${line}`);
}

const written = new Set<string>();

/** Keeps a source under a name that tells launches and variants of one kernel apart. */
function keepSource(stem: string, language: string, text: string): void {
  const file = `${stem}-${fingerprint(text)}.${language}`.replaceAll(/[^\w.-]+/g, '-');
  if (written.has(file)) return;
  written.add(file);
  const fs = host.process?.getBuiltinModule?.('node:fs');
  if (fs === undefined) {
    host.SAGEATTENTION_SOURCES ??= {};
    host.SAGEATTENTION_SOURCES[file] = text;
    say(`source: SAGEATTENTION_SOURCES['${file}']`);
    return;
  }
  const folder = setting('SAGEATTENTION_DEBUG_FOLDER') ?? 'sageattention-debug';
  try {
    fs.mkdirSync(folder, { recursive: true });
    fs.writeFileSync(`${folder}/${file}`, text);
    say(`source: ${folder}/${file}`);
  } catch (error) {
    // A full disk is no reason for a call to fail.
    say(`source not written: ${messageOf(error)}`);
  }
}

/** FNV-1a, 32 bits: enough to tell a program's kernels apart. */
function fingerprint(text: string): string {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(16).padStart(8, '0');
}

const listed = (settings: Readonly<Record<string, unknown>>) =>
  Object.entries(settings)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${name}=${typeof value === 'object' ? JSON.stringify(value) : value}`)
    .join(' ');

/** Tells of a plan if the environment asks for it. `describe` is called only then. */
export function debugPlan(describe: () => DebugPlan): void {
  const level = debugLevel();
  if (level === 0) return;
  const { backend, kernel, settings, launches, scratchBytes } = describe();
  say(`${backend} ${kernel} ${listed(settings)}`);
  if (level < 2) return;
  for (const { name, grid, sharedBytes } of launches) {
    say(`  ${name}: grid ${grid.join(' x ')}${sharedBytes === undefined ? '' : `, ${sharedBytes} bytes shared`}`);
  }
  if (scratchBytes !== undefined) say(`  ${scratchBytes} bytes of scratch`);
  if (level < 3) return;
  for (const { name, language, source } of launches) keepSource(`${backend}-${kernel}-${name}`, language, source());
}
