/** Section 1: this device's features, what the library chooses on it, and whether it computes correctly. */
import * as Comlink from 'comlink';
import { byId, exclusively, h, messageOf, say, saySteadily } from '../dom.ts';
import { duration } from '../format.ts';
import type { CheckResult } from '../self-check.ts';
import type { BackendReport, DeviceApi, DeviceReport } from '../workers/device.ts';

const TITLES = { webgpu: 'WebGPU', wasm: 'WebAssembly' } as const;

/** What a kernel family is, for those who have not read the documentation. */
const FAMILIES: Readonly<Record<string, string>> = {
  matrix: 'Family matrix: 8-bit products on the matrix units, which this device offers to shaders.',
  subgroup: 'Family subgroup: packed 8-bit dot products, with rows shared between the lanes of a subgroup.',
  base: 'Family base: core WebGPU alone, as this device offers shaders nothing faster.',
};

function explain({ name, availability }: BackendReport, { crossOriginIsolated }: DeviceReport): string {
  if (!availability.available) {
    const said = [availability.reason, availability.remedy].filter((text) => text).join('. ');
    return `${said.charAt(0).toUpperCase()}${said.slice(1)}${said.endsWith('.') ? '' : '.'}`;
  }
  if (name === 'webgpu') {
    const family = FAMILIES[availability.details.family ?? ''] ?? '';
    return availability.accelerated
      ? family
      : `${family} The adapter is a software driver: right, but slower than WebAssembly, which is taken instead.`;
  }
  const build =
    availability.details.simd === 'relaxed'
      ? 'Relaxed SIMD build: this engine multiplies 8-bit integers in one instruction, and a test of its values came out right. '
      : 'SIMD128 build: 16-bit products, as the 8-bit instruction is missing here or computes wrongly. ';
  return crossOriginIsolated
    ? `${build}The page is cross-origin isolated, so threads can share one memory.`
    : `${build}The page is not cross-origin isolated, so there is one thread. Its host must send the headers Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp.`;
}

function card(backend: BackendReport, report: DeviceReport): HTMLElement {
  const { name, availability, kernels } = backend;
  const { available, details } = availability;
  const state = !available ? 'not available' : report.chosen === name ? 'in use' : 'available';
  return h(
    'article',
    { class: 'card', 'data-backend': name },
    h('header', {}, h('h3', {}, TITLES[name]), h('span', { class: state === 'in use' ? 'badge on' : 'badge' }, state)),
    h('p', {}, explain(backend, report)),
    available &&
      h(
        'details',
        {},
        h('summary', {}, 'Features and kernels'),
        h(
          'dl',
          {},
          Object.entries(details)
            // The backend in use changes with every call; the card is made once.
            .filter(([fact]) => fact !== 'memory')
            .flatMap(([fact, value]) => [h('dt', {}, fact), h('dd', {}, value)]),
          kernels.flatMap(({ name: kernel, summary }, i) => [
            h('dt', {}, i === 0 ? 'kernels' : ''),
            h('dd', {}, h('code', {}, kernel), ` ${summary}`),
          ]),
        ),
      ),
  );
}

interface KernelChecks {
  readonly element: HTMLDetailsElement;
  readonly list: HTMLUListElement;
  count(isFailure: boolean): void;
  /** Closes the list where nothing failed. */
  fold(): void;
}

function checksOf(title: string): KernelChecks {
  const list = h('ul');
  const tally = h('small', {}, '');
  const element = h('details', { open: true }, h('summary', {}, h('h3', {}, title), tally), list);
  let [done, failed] = [0, 0];
  return {
    element,
    list,
    count(isFailure) {
      done++;
      if (isFailure) failed++;
      tally.textContent = failed === 0 ? `${done} passed` : `${failed} of ${done} failed`;
      tally.classList.toggle('bad', failed > 0);
    },
    fold() {
      element.open = failed > 0;
    },
  };
}

const firstLine = (text: string) => (text.split('\n')[0] ?? '').slice(0, 300);

function statusOf({ chosen, backends }: DeviceReport): string {
  const webgpu = backends.find(({ name }) => name === 'webgpu')?.availability;
  const wasm = backends.find(({ name }) => name === 'wasm')?.availability;
  if (chosen === 'webgpu') return `Running on WebGPU: ${webgpu?.details.adapter ?? 'an unnamed GPU'}.`;
  if (wasm?.available !== true) return 'This browser runs neither WebGPU nor WebAssembly with SIMD.';
  const why = webgpu?.available === true ? 'WebGPU here is a software driver' : 'This browser offers no WebGPU';
  return `${why}, so everything below runs on WebAssembly: ${wasm.details.threads ?? ''}.`;
}

export async function startDevice(device: Comlink.Remote<DeviceApi>): Promise<DeviceReport> {
  const cards = byId('backends');
  const show = async () => {
    const report = await device.describe();
    say(byId('status'), statusOf(report));
    cards.replaceChildren(...report.backends.map((backend) => card(backend, report)));
    return report;
  };
  const report = await show();

  const start = byId<HTMLButtonElement>('check-start');
  const note = byId('check-note');
  const lists = byId('checks');
  exclusively(start, async () => {
    lists.replaceChildren();
    saySteadily(note, true);
    const byKernel = new Map<string, KernelChecks>();
    let done = 0;
    let failed = 0;
    const onResult = ({ backend, kernel, name, milliseconds, failure }: CheckResult, total: number) => {
      const title = `${TITLES[backend as BackendReport['name']]}, ${kernel}`;
      let checks = byKernel.get(title);
      if (checks === undefined) {
        checks = checksOf(title);
        byKernel.set(title, checks);
        lists.append(checks.element);
      }
      done++;
      if (failure !== undefined) failed++;
      checks.count(failure !== undefined);
      const mark = h('span', { 'aria-hidden': 'true' }, failure === undefined ? '✓' : '✗');
      const said = h('span', {}, failure === undefined ? name : `${name}: wrong`);
      checks.list.append(
        h(
          'li',
          { class: failure === undefined ? 'pass' : 'fail' },
          mark,
          said,
          h('small', {}, failure === undefined ? duration(milliseconds) : firstLine(failure)),
        ),
      );
      say(note, `${done} of ${total} checks, ${failed === 0 ? 'all passed so far' : `${failed} failed`}.`, failed > 0);
    };
    try {
      await device.check(Comlink.proxy(onResult));
      // What is green is folded: the note says that all is well.
      for (const checks of byKernel.values()) checks.fold();
      say(note, failed === 0 ? `All ${done} checks passed.` : `${failed} of ${done} checks failed.`, failed > 0);
    } catch (error) {
      say(note, messageOf(error), true);
    } finally {
      saySteadily(note, false);
    }
  });
  return report;
}
