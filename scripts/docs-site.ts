/**
 * `npm run docs:site [-- --out FOLDER]`: guides and API reference as one site (docs/typedoc.json), which any host can serve. Beside the
 * pages it has the guides' Markdown, and `llms.txt` and `llms-full.txt` for programs that read it (llmstxt.org).
 */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  Application,
  ArgumentsReader,
  type CommentDisplayPart,
  type CommentTag,
  Converter,
  IndexEvent,
  type ProjectReflection,
  ReflectionKind,
  TSConfigReader,
  TypeDocReader,
} from 'typedoc';

const DOCS = fileURLToPath(new URL('../docs', import.meta.url));

/** `@throws {A | B} when` says which classes; TypeDoc by itself leaves them out. */
function nameThrown(project: ProjectReflection): void {
  const classes = new Map(project.getReflectionsByKind(ReflectionKind.Class).map((one) => [one.name, one]));
  const linked = (name: string): CommentDisplayPart => {
    const target = classes.get(name);
    return target === undefined
      ? { kind: 'code', text: `\`${name}\`` }
      : { kind: 'inline-tag', tag: '@link', text: name, target };
  };
  const spell = (tag: CommentTag) => {
    const names = tag.typeAnnotation?.match(/\w+/g) ?? [];
    delete tag.typeAnnotation;
    const before = names.flatMap((name, i): CommentDisplayPart[] => [
      ...(i === 0 ? [] : [{ kind: 'text', text: ' or ' } as const]),
      linked(name),
    ]);
    if (before.length > 0) tag.content = [...before, { kind: 'text', text: ': ' }, ...tag.content];
  };
  for (const { comment } of Object.values(project.reflections)) comment?.getTags('@throws').forEach(spell);
}

const app = await Application.bootstrapWithPlugins({ options: path.join(DOCS, 'typedoc.json') }, [
  new TypeDocReader(),
  new TSConfigReader(),
  new ArgumentsReader(300),
]);
app.converter.on(Converter.EVENT_RESOLVE_BEGIN, ({ project }) => nameThrown(project));
// Of a guide and a member of one class that both have the word, the guide is what somebody looks for.
app.renderer.on(IndexEvent.PREPARE_INDEX, ({ searchResults }) => {
  for (const result of searchResults) if (result.isDocument()) result.relevanceBoost = 8;
});

const project = await app.convert();
if (project === undefined) process.exit(1);
app.validate(project);
await app.generateOutputs(project);
if (app.logger.hasErrors() || app.logger.hasWarnings()) process.exit(1);

/** A page without its front matter and the comments that only tests and tables read. */
const readPage = (name: string): string =>
  readFileSync(path.join(DOCS, name), 'utf8')
    .replace(/^---\n[\s\S]*?\n---\n/, '')
    .replaceAll(/<!--[\s\S]*?-->\n?/g, '')
    .trim();

const site = app.options.getValue('out');
const index = readPage('index.md');
const pages = readdirSync(DOCS).filter((name) => name.endsWith('.md') && name !== 'index.md');
mkdirSync(path.join(site, 'markdown'), { recursive: true });
for (const name of pages) writeFileSync(path.join(site, 'markdown', name), `${readPage(name)}\n`);

/** Links between pages lead to their Markdown. */
const toMarkdown = (text: string): string => text.replaceAll(/\]\(([\w-]+\.md)/g, '](markdown/$1');
const [title = '', summary = ''] = index.split('\n\n');
const head = `${title}\n\n> ${toMarkdown(summary.replaceAll('\n', ' '))}\n`;
// The sections of the first page that are lists of guides.
const lists = index.split(/^(?=## )/m).filter((section) => /^## .*\n\n- \[/.test(section));
writeFileSync(path.join(site, 'llms.txt'), [head, ...lists.map((list) => toMarkdown(list).trim())].join('\n\n'));
writeFileSync(
  path.join(site, 'llms-full.txt'),
  [head, ...pages.map((name) => `\n\n<!-- markdown/${name} -->\n\n${readPage(name)}`)].join(''),
);
