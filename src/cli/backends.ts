/** Which backends and kernels a command runs on. */
import { UserError } from './errors.ts';
import { type Backend, type BackendName, getBackend, type KernelName, listBackends } from './library.ts';

const offers = (backend: Backend, kernel: KernelName | 'auto') =>
  kernel === 'auto' || backend.kernels.some(({ name }) => name === kernel);

/** The available backends, most preferred first, that offer a kernel; those that `names` lists, if it does. */
export async function availableBackends(
  kernel: KernelName | 'auto' = 'auto',
  names?: readonly BackendName[],
): Promise<{ backend: Backend; accelerated: boolean }[]> {
  const listed = await listBackends(names);
  for (const name of names ?? []) {
    const found = listed.find((entry) => entry.name === name);
    if (found?.availability.available === true) continue;
    const { reason = 'this version does not contain it', remedy = '' } = found?.availability ?? {};
    throw new UserError(`backend ${name} is not available: ${reason}. ${remedy}`.trim());
  }
  const backends = await Promise.all(
    listed
      .filter(({ availability }) => availability.available)
      .map(async ({ name, availability }) => ({
        backend: await getBackend(name),
        accelerated: availability.accelerated,
      })),
  );
  const offering = backends.filter(({ backend }) => offers(backend, kernel));
  if (offering.length === 0) {
    const which = backends.map(({ backend }) => backend.name).join(', ');
    throw new UserError(
      which === ''
        ? 'no backend is available; `sageattention doctor` says why'
        : `kernel ${kernel} is not one of backend ${which}; \`sageattention doctor\` lists each backend's kernels`,
    );
  }
  return offering;
}

/** Every kernel of these backends, or those that `asked` lists; each of those must be one that a backend has. */
export function offeredKernels(
  backends: readonly { backend: Backend }[],
  asked: readonly KernelName[] | undefined,
): { backend: BackendName; kernel: KernelName }[] {
  const offered = backends.flatMap(({ backend }) =>
    backend.kernels
      .filter(({ name }) => asked?.includes(name) ?? true)
      .map(({ name }) => ({ backend: backend.name, kernel: name })),
  );
  const missing = asked?.find((name) => !offered.some(({ kernel }) => kernel === name));
  if (missing !== undefined) {
    const names = backends.map(({ backend }) => backend.name).join(', ');
    throw new UserError(
      `kernel ${missing} is not one of backend ${names}; \`sageattention doctor\` lists the kernels, and what the other backends lack`,
    );
  }
  return offered;
}

/** The one backend that `sageattn` would take: the most preferred that is accelerated, else the least preferred. */
export async function chooseBackend(name: BackendName | 'auto', kernel: KernelName | 'auto'): Promise<Backend> {
  const candidates = await availableBackends(kernel, name === 'auto' ? undefined : [name]);
  const chosen = candidates.find(({ accelerated }) => accelerated) ?? candidates.at(-1);
  return (chosen as NonNullable<typeof chosen>).backend;
}
