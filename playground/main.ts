/** The playground: a first screen and four sections, each started when its prerequisites are there. */
import * as Comlink from 'comlink';
import { connect, warn } from './alert.ts';
import { byId, messageOf, say } from './dom.ts';
import { createModelClient } from './model-client.ts';
import { startDevice } from './sections/device.ts';
import { startPicture, startQuickRun } from './sections/hero.ts';
import { startModel } from './sections/model.ts';
import { findOrt, startSpeed } from './sections/speed.ts';
import { startWhy } from './sections/why.ts';
import type { DeviceApi } from './workers/device.ts';

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
  startPicture();
  const model = createModelClient();
  startWhy(model);
  const device = connect<DeviceApi>(new Worker(new URL('./workers/device.ts', import.meta.url), { type: 'module' }));
  void device.watchDevice(Comlink.proxy(warn));
  const [report, ortBase] = await Promise.all([startDevice(device), findOrt()]);
  startQuickRun(device, report, ortBase);
  startModel(model, report, ortBase);
  await startSpeed(device, report, ortBase);
  // Only with ?debug: lets a test take the GPU away while something runs.
  if (new URLSearchParams(location.search).has('debug')) {
    Object.assign(globalThis, { playground: { loseDevice: () => device.loseDevice() } });
  }
}

start().catch((error: unknown) => say(byId('status'), messageOf(error), true));
