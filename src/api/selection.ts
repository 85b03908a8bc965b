/** Which backend a call runs on. */

import type { AttentionOptions, BackendName } from '../attention/options.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import type { Backend } from '../backends/backend.ts';
import { obstacleTo } from '../backends/choice.ts';
import {
  askAvailability,
  BACKEND_PREFERENCE,
  getBackend,
  knownAvailability,
  loadedBackend,
} from '../backends/registry.ts';
import { BackendUnavailableError, InvalidArgumentError } from '../errors.ts';

async function usable(name: BackendName): Promise<Backend> {
  const backend = await getBackend(name);
  const known = knownAvailability(backend);
  // One that was absent may have come since: it was asked for by name.
  const { available, reason, remedy } = known?.available === true ? known : await askAvailability(backend);
  if (!available) throw new BackendUnavailableError(name, reason ?? 'unknown reason', remedy ?? '');
  return backend;
}

/** Whether it has the kernel that is asked for, if any is, for a problem like this one. */
const offers = (backend: Backend, problem: AttentionProblem, kernel: AttentionOptions['kernel'] = 'auto'): boolean =>
  backend.kernels.some(
    (descriptor) => (kernel === 'auto' || descriptor.name === kernel) && obstacleTo(descriptor, problem) === undefined,
  );

/** What of a problem a kernel may lack, in words. */
const featuresOf = ({ headDim, valueDim, sinks, blocks }: AttentionProblem): string =>
  `head dims of ${headDim} and ${valueDim}${sinks ? ', with sinks' : ''}${blocks ? ', with a block mask' : ''}`;

/**
 * CPU tensors: the most preferred backend that is accelerated and offers the kernel, else one that merely offers it.
 */
async function backendForCpuTensors(problem: AttentionProblem, kernel: AttentionOptions['kernel']): Promise<Backend> {
  let fallback: Backend | undefined;
  // The last one's counts: it is the one that should run everywhere, and nobody misses CUDA in a browser.
  let failure: unknown;
  for (const name of BACKEND_PREFERENCE) {
    try {
      const backend = await getBackend(name);
      if (!offers(backend, problem, kernel)) continue;
      const availability = knownAvailability(backend) ?? (await askAvailability(backend));
      if (availability.available && availability.accelerated) return backend;
      if (availability.available) fallback = backend;
      else failure = new BackendUnavailableError(name, availability.reason ?? '', availability.remedy ?? '');
    } catch (error) {
      failure = error;
    }
  }
  if (fallback !== undefined) return fallback;
  throw (
    failure ??
    new BackendUnavailableError(
      'auto',
      `no backend here has kernel '${kernel}' for ${featuresOf(problem)}`,
      'Choose another kernel',
    )
  );
}

/**
 * The backend that a call runs on: where its tensors live, or for CPU tensors the one asked for or the most preferred.
 *
 * @throws {BackendUnavailableError} none that was asked for can run here
 * @throws {InvalidArgumentError} `mixed-locations`: another backend than where the tensors are
 */
export async function chooseBackend(problem: AttentionProblem, options: AttentionOptions): Promise<Backend> {
  const asked = options.backend ?? 'auto';
  if (problem.location === 'cpu') {
    return asked === 'auto' ? backendForCpuTensors(problem, options.kernel) : usable(asked);
  }
  if (asked !== 'auto' && asked !== problem.location) {
    throw new InvalidArgumentError(
      'mixed-locations',
      'options.backend',
      `'${problem.location}', where the tensors are`,
      `'${asked}'`,
    );
  }
  return usable(problem.location);
}

/** What {@link chooseBackend} gives, if that is known without asking any backend. */
export function readyBackend(problem: AttentionProblem, options: AttentionOptions): Backend | undefined {
  const asked = options.backend ?? 'auto';
  const named = problem.location === 'cpu' ? asked : problem.location;
  if (named !== 'auto') {
    const backend = asked === 'auto' || asked === named ? loadedBackend(named) : undefined;
    return backend && knownAvailability(backend)?.available === true ? backend : undefined;
  }
  let fallback: Backend | undefined;
  for (const name of BACKEND_PREFERENCE) {
    const backend = loadedBackend(name);
    if (backend === null) continue;
    const availability = backend && knownAvailability(backend);
    if (availability === undefined) return undefined;
    if (!offers(backend as Backend, problem, options.kernel) || !availability.available) continue;
    if (availability.accelerated) return backend;
    fallback = backend;
  }
  return fallback;
}
