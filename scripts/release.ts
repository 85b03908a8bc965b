/**
 * One command makes a release: `npm run release` builds from a clean tree, checks the tarball by its content and in
 * every kind of project (scripts/consumers.ts), and leaves it in `release/`; `npm run release -- --publish` then
 * publishes that very tarball, with provenance where the registry offers it.
 *
 * Where the sources are is known to the machine that releases, not to the sources: `repository`, `homepage` and `bugs`
 * come from the remote `origin`, or in a GitHub workflow from its environment; so do the links of the README.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { messageOf } from '../src/errors.ts';
import { pack } from './check-package.ts';
import { readmeForNpm } from './readme-for-npm.ts';

/** It throws, so that what a release changes for a while is put back whatever fails. */
function run(command: string, args: readonly string[]): void {
  const { status, signal } = spawnSync(command, args, { stdio: ['ignore', 'inherit', 'inherit'] });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${status ?? signal}`);
}

const output = (command: string, args: readonly string[]): string =>
  spawnSync(command, args, { encoding: 'utf8' }).stdout.trim();

/** The page of the repository, `https://host/owner/name`. */
function repositoryPage(): string | undefined {
  const { GITHUB_SERVER_URL: server, GITHUB_REPOSITORY: name } = process.env;
  if (server !== undefined && name !== undefined) return `${server}/${name}`;
  const origin = output('git', ['remote', 'get-url', 'origin']);
  const [, host, path] = /^(?:https:\/\/|ssh:\/\/git@|git@)([^/:]+)[/:](.+?)(?:\.git)?$/.exec(origin) ?? [];
  return host === undefined ? undefined : `https://${host}/${path}`;
}

const page = repositoryPage();
if (page === undefined) {
  console.error("a release names its repository: set the remote 'origin', or GITHUB_SERVER_URL and GITHUB_REPOSITORY");
  process.exit(2);
}
if (output('git', ['status', '--porcelain']) !== '') {
  console.error('there are uncommitted changes; a release is made of what is committed');
  process.exit(2);
}
const manifest = readFileSync('package.json', 'utf8');
const readme = readFileSync('README.md', 'utf8');
try {
  run('npm', ['run', 'build']);
  const fields = {
    repository: { type: 'git', url: `git+${page}.git` },
    homepage: `${page}#readme`,
    bugs: { url: `${page}/issues` },
  };
  writeFileSync('package.json', `${JSON.stringify({ ...JSON.parse(manifest), ...fields }, null, 2)}\n`);
  writeFileSync('README.md', readmeForNpm(readme, page, JSON.parse(manifest).version));
  rmSync('release', { recursive: true, force: true });
  mkdirSync('release');
  const tarball = pack('release');
  run('npx', ['tsx', 'scripts/check-package.ts', tarball]);
  run('npx', ['tsx', 'scripts/consumers.ts', '--tarball', tarball]);
  console.log(`${tarball} is what npm will have`);
  if (process.argv.includes('--publish')) {
    const provenance = process.env.GITHUB_ACTIONS === 'true' ? ['--provenance'] : [];
    run('npm', ['publish', tarball, '--access', 'public', ...provenance]);
  }
} catch (error) {
  console.error(`no release: ${messageOf(error)}`);
  process.exitCode = 1;
} finally {
  writeFileSync('package.json', manifest);
  writeFileSync('README.md', readme);
}
