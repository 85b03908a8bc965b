/**
 * `npm run test:consumers [-- NAME...] [--tarball FILE]`: installs the packed package into fresh projects of every kind
 * (test/consumers/consumers.ts), with a home folder and an npm cache that are empty at first, builds and runs them, pages in
 * Chromium, Firefox and WebKit. Any warning fails. A release runs all; they take minutes and the npm registry.
 */
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { homedir, tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import type { Browser } from 'playwright-core';
import { ISOLATION_HEADERS, serveFile } from '../src/cli/playground-server.ts';
import { CONSUMERS, type Consumer, DONE, STRICT_POLICY } from '../test/consumers/consumers.ts';
import { openEngine, type Tab } from '../test/engines/drivers.ts';
import { launchChromium, launchWithExtension, missingChromium } from '../test/support/chromium.ts';
import { pack } from './check-package.ts';
import { ENGINES, type Engine } from './engines.ts';
import { ensureRuntime } from './runtimes.ts';

const { values: flags, positionals: names } = parseArgs({
  allowPositionals: true,
  options: { tarball: { type: 'string' }, keep: { type: 'boolean', default: false } },
});
/** Milliseconds that a page or a server may take to answer. */
const PATIENCE = 60_000;

/** Words of npm about packages that are not ours. */
const NOT_OURS = /npm (warn|notice)|deprecated|browserslist|caniuse/i;
const warningsIn = (text: string): string[] =>
  text.split('\n').filter((line) => /\bwarn(ing)?\b/i.test(line) && !NOT_OURS.test(line));

interface Place {
  readonly folder: string;
  readonly env: NodeJS.ProcessEnv;
}

interface Said {
  readonly stdout: string;
  /** Both streams. */
  readonly all: string;
}

function run([command = '', ...args]: readonly string[], { folder, env }: Place): Said {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: folder,
    env,
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  });
  const text = `${stdout}${stderr}`;
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${status ?? error}\n${text.slice(-2000)}`);
  return { stdout, all: text };
}

/** As on a machine that has seen nothing yet; which registry there is, the user's npm settings go on to say. */
const cleanMachine = (): NodeJS.ProcessEnv => ({
  HOME: path.join(root, 'home'),
  USERPROFILE: path.join(root, 'home'),
  npm_config_cache: path.join(root, 'npm-cache'),
  npm_config_userconfig: process.env.npm_config_userconfig ?? path.join(homedir(), '.npmrc'),
});

function build(
  { files, packages = [], commands = [], runtimes = [] }: Consumer,
  folder: string,
  tarball: string,
): Place {
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(path.dirname(path.join(folder, name)), { recursive: true });
    writeFileSync(path.join(folder, name), content);
  }
  const bins = runtimes.map((name) => path.dirname(ensureRuntime(name)));
  // Of this repository, `npm run` puts the tools on the path; a project must find its own.
  const inherited = (process.env.PATH ?? '').split(path.delimiter).filter((at) => !at.includes('node_modules'));
  const own = Object.entries(process.env).filter(([name]) => !/^npm_(package|lifecycle|config_local)/.test(name));
  const env: NodeJS.ProcessEnv = {
    ...Object.fromEntries(own),
    ...cleanMachine(),
    PATH: [...bins, ...inherited].join(path.delimiter),
    CI: 'true',
    NO_COLOR: '1',
  };
  const place = { folder, env };
  run(['npm', 'install', '--no-audit', '--no-fund', tarball, ...packages], place);
  for (const command of commands) {
    const warnings = warningsIn(run(command, place).all);
    if (warnings.length > 0) throw new Error(`${command.join(' ')} warned:\n${warnings.slice(0, 10).join('\n')}`);
  }
  return place;
}

/** What a browser says by itself where its machine has no GPU; the library then takes another backend. */
const NO_GPU = /WebGPU Context Provider/;
/** And where a policy kept the library from starting a worker of `blob:`; it then computes without. */
const NO_BLOB_WORKER = /blob:.* violates the following Content Security Policy/;

/** Where a page answers, in its own words: `waiting` or nothing until it has computed. */
const answerPlace = (right: string) =>
  right === DONE ? 'document.title' : "document.querySelector('output')?.textContent ?? ''";
const isAnswer = (text: string) => text !== 'waiting' && text !== '';

/** Opens a page and waits for its answer. */
async function answerOf(browser: Browser, url: string, right: string, accepted: readonly RegExp[]): Promise<string> {
  const page = await browser.newPage();
  const said: string[] = [];
  page.on('console', (message) => {
    // Every browser asks for an icon.
    const own = message.location().url.endsWith('/favicon.ico') || accepted.some((one) => one.test(message.text()));
    if (!own && ['error', 'warning'].includes(message.type())) said.push(message.text());
  });
  page.on('pageerror', (error) => said.push(String(error)));
  try {
    await page.goto(url);
    let answer = 'waiting';
    for (const until = Date.now() + PATIENCE; Date.now() < until && !isAnswer(answer); ) {
      answer = await page.evaluate<string>(answerPlace(right));
      if (!isAnswer(answer)) await new Promise((go) => setTimeout(go, 50));
    }
    return said.length === 0 ? answer : `${answer}; console: ${said.join(' | ')}`;
  } finally {
    await page.close();
  }
}

/** The answer of a page in an engine whose driver tells nothing of its console. */
async function answerIn(tab: Tab, url: string, right: string): Promise<string> {
  await tab.open(url);
  for (const until = Date.now() + PATIENCE; Date.now() < until; await new Promise((go) => setTimeout(go, 50))) {
    const answer = await tab.evaluate<string>(answerPlace(right));
    if (isAnswer(answer)) return answer;
  }
  return 'waiting';
}

interface Browsers {
  readonly chromium: Browser;
  readonly tabs: ReadonlyMap<Engine, Tab>;
}

/** The answer that every browser gives, or the first one that is wrong. */
async function answerEverywhere(
  { chromium, tabs }: Browsers,
  url: string,
  right: string,
  accepted: readonly RegExp[],
): Promise<string> {
  const answer = await answerOf(chromium, url, right, accepted);
  if (answer !== right) return answer;
  for (const [engine, tab] of tabs) {
    const other = await answerIn(tab, url, right);
    if (other !== right) return `${engine}: ${other}`;
  }
  return right;
}

/** Headers of every answer, by the case that they stand for, and what the console may say in that case. */
const HOSTS: Readonly<Record<string, { headers: Readonly<Record<string, string>>; blobIsRefused: boolean }>> = {
  plain: { headers: {}, blobIsRefused: false },
  isolated: { headers: ISOLATION_HEADERS, blobIsRefused: false },
  strict: { headers: { ...ISOLATION_HEADERS, 'Content-Security-Policy': STRICT_POLICY }, blobIsRefused: true },
};

async function servedAnswer(
  browsers: Browsers,
  folder: string,
  right: string,
  { withinPolicy = false, inlineScript }: Extract<Consumer['run'], { readonly page: string }>,
): Promise<string> {
  const hash = inlineScript === undefined ? '' : createHash('sha256').update(inlineScript).digest('base64');
  let sent: Readonly<Record<string, string>> = {};
  const server = createServer((request, response) => {
    for (const [name, value] of Object.entries(sent)) response.setHeader(name, value);
    const [target = '/'] = (request.url ?? '/').split('?', 1);
    serveFile(request, response, folder, target, () => {
      // Every browser asks for an icon.
      response.statusCode = target === '/favicon.ico' ? 204 : 404;
      response.end();
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  try {
    for (const [host, { headers, blobIsRefused }] of Object.entries(HOSTS)) {
      sent = Object.fromEntries(
        Object.entries(headers).map(([name, value]) => [
          name,
          hash === '' ? value : value.replace("script-src 'self'", `script-src 'self' 'sha256-${hash}'`),
        ]),
      );
      const accepted = blobIsRefused && !withinPolicy ? [NO_GPU, NO_BLOB_WORKER] : [NO_GPU];
      const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
      const answer = await answerEverywhere(browsers, url, right, accepted);
      if (answer !== right) return `${host}: ${answer}`;
    }
    return right;
  } finally {
    server.close();
    server.closeAllConnections();
  }
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function serverAnswers(browsers: Browsers, consumer: Consumer, { folder, env }: Place): Promise<string> {
  if (!('server' in consumer.run)) return '';
  const { says: right = DONE } = consumer;
  const port = await freePort();
  const [command = '', ...args] = consumer.run.server;
  const child = spawn(command, [...args, String(port)], { cwd: folder, env, stdio: 'ignore', detached: true });
  try {
    const until = Date.now() + PATIENCE;
    const url = `http://127.0.0.1:${port}`;
    while (
      !(await fetch(url).then(
        () => true,
        () => false,
      ))
    ) {
      if (Date.now() > until) return 'the server did not start';
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
    for (const page of consumer.run.pages) {
      const text =
        page === '/'
          ? await answerEverywhere(browsers, url, right, [NO_GPU, NO_BLOB_WORKER])
          : await (await fetch(`${url}${page}`)).text();
      // What a page says goes with what its console said; a route's text has more around it.
      if (page === '/' ? text !== right : !text.includes(right)) return `${page}: ${text.slice(0, 500)}`;
    }
    return right;
  } finally {
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
  }
}

/** What the extension's background left in `result`. */
async function extensionResult(folder: string): Promise<string> {
  const context = await launchWithExtension(folder);
  try {
    const worker = context.serviceWorkers()[0] ?? (await context.waitForEvent('serviceworker', { timeout: PATIENCE }));
    for (const until = Date.now() + PATIENCE; Date.now() < until; ) {
      const text = await worker.evaluate(() => (globalThis as { result?: string }).result);
      if (text !== undefined) return text;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    return 'the background gave no result';
  } finally {
    await context.close();
  }
}

async function result(consumer: Consumer, place: Place, browsers: Browsers): Promise<string> {
  if ('command' in consumer.run) return run(consumer.run.command, place).stdout.trim();
  if ('page' in consumer.run) {
    return servedAnswer(browsers, path.join(place.folder, consumer.run.page), consumer.says ?? DONE, consumer.run);
  }
  if ('extension' in consumer.run) return extensionResult(path.join(place.folder, consumer.run.extension));
  return serverAnswers(browsers, consumer, place);
}

const missing = missingChromium();
if (missing !== undefined) throw new Error(`could not run: ${missing}`);
const unknown = names.filter((name) => !CONSUMERS.some((consumer) => consumer.name === name));
if (unknown.length > 0)
  throw new Error(`no consumer '${unknown[0]}'; there are ${CONSUMERS.map(({ name }) => name).join(', ')}`);

const root = mkdtempSync(path.join(tmpdir(), 'sageattention-consumers-'));
mkdirSync(path.join(root, 'home'));
const chromium = await launchChromium('none');
const tabs = new Map<Engine, Tab>();
let [passed, failed] = [0, 0];
try {
  for (const engine of ENGINES) tabs.set(engine, await openEngine(engine));
  const tarball = flags.tarball === undefined ? pack(root) : path.resolve(flags.tarball);
  for (const consumer of CONSUMERS.filter(({ name }) => names.length === 0 || names.includes(name))) {
    const folder = path.join(root, consumer.name);
    mkdirSync(folder);
    const start = Date.now();
    const outcome = await (async () => result(consumer, build(consumer, folder, tarball), { chromium, tabs }))().catch(
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    );
    const seconds = Math.round((Date.now() - start) / 1000);
    const isRight = outcome === (consumer.says ?? DONE);
    if (isRight) passed++;
    else failed++;
    console.log(`${isRight ? 'passed' : 'FAILED'}  ${consumer.name} (${seconds} s)${isRight ? '' : `\n${outcome}`}`);
    if (!flags.keep) rmSync(folder, { recursive: true, force: true });
  }
} finally {
  for (const tab of tabs.values()) await tab.close();
  await chromium.close();
  if (!flags.keep) rmSync(root, { recursive: true, force: true });
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
