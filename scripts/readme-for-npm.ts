/**
 * The README of a release. On npm, and in node_modules, a link relative to the repository leads nowhere (and npm mends only a part of
 * them: not `srcset`), so a release has every link whole.
 */

/** Links and pictures of Markdown, and the attributes of HTML, that are relative to the repository's root. */
const RELATIVE = /(?<before>\]\(|(?:src|srcset|href)=")(?!#|[a-z][a-z+.-]*:|\/\/)(?<target>[^)"\s]+)/g;

const PICTURE = /\.(svg|png|webp|gif|jpe?g)$/;

/** Targets of a README that npm's page cannot follow. */
export const relativeTargets = (readme: string): string[] =>
  [...readme.matchAll(RELATIVE)].map(({ groups }) => groups?.target ?? '');

/**
 * @param page of the repository, `https://host/owner/name`
 * @param version whose tag has the files as they were released
 */
export const readmeForNpm = (readme: string, page: string, version: string): string =>
  readme.replace(
    RELATIVE,
    (_, before: string, target: string) =>
      `${before}${page}/${PICTURE.test(target) ? 'raw' : 'blob'}/v${version}/${target}`,
  );
