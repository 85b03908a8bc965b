/** The playground: four sections, each started when what it needs is there. */
import { connect, warn } from './alert.ts';
import { byId, messageOf, say } from './dom.ts';
import { createModelClient } from './model-client.ts';
import { startDevice } from './sections/device.ts';
import { startModel } from './sections/model.ts';
import { findOrt, startSpeed } from './sections/speed.ts';
import { startWhy } from './sections/why.ts';
import type { DeviceApi } from './workers/device.ts';

const onLoss = (reason: string) =>
  warn(`The GPU was taken away: ${reason} A new device is being opened, and the work is done again.`);

/** Marks the section in sight in the navigation. */
function followScrolling(): void {
  const links = [...document.querySelectorAll<HTMLAnchorElement>('nav a')];
  const seen = new IntersectionObserver(
    (entries) => {
      const shown = entries.find(({ isIntersecting }) => isIntersecting)?.target.id;
      if (shown === undefined) return;
      for (const link of links) {
        if (link.hash === `#${shown}`) link.setAttribute('aria-current', 'true');
        else link.removeAttribute('aria-current');
      }
    },
    { rootMargin: '-30% 0px -60% 0px' },
  );
  for (const section of document.querySelectorAll('main > section')) seen.observe(section);
}

async function start(): Promise<void> {
  followScrolling();
  const model = createModelClient();
  startWhy(model);
  const device = connect<DeviceApi>(new Worker(new URL('./workers/device.ts', import.meta.url), { type: 'module' }));
  const [report, ortBase] = await Promise.all([startDevice(device, onLoss), findOrt()]);
  startModel(model, report, ortBase, onLoss);
  await startSpeed(device, report, ortBase, onLoss);
  // Only with ?debug: lets a test take the GPU away while something runs.
  if (new URLSearchParams(location.search).has('debug')) {
    Object.assign(globalThis, { playground: { loseDevice: () => device.loseDevice() } });
  }
}

start().catch((error: unknown) => say(byId('status'), messageOf(error), true));
